"""Makes finished layers durable while the next one runs.

A layer counts as finished when its bytes and its scores are on the disk and its line is in the
journal, in that order. Waiting for the disk is left to one thread, so the pass goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from typing_extensions import Self

from reap_stream.checkpoint.job import Job
from reap_stream.checkpoint.output import OutputWriter


class Committer:
    """Syncs writers and appends to a job's journal, in order, in the background."""

    def __init__(self, job: Job, writers: Sequence[OutputWriter]) -> None:
        self._job = job
        self._writers = list(writers)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reap-commit")
        self._pending: list[Future[None]] = []

    def __enter__(self) -> Self:
        """Nothing more to open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits for what is under way; an error of it is raised unless one is on its way already."""
        self._pool.shutdown(wait=True)
        if kind is None:
            self.drain()

    def commit(self, entry: dict[str, Any]) -> None:
        """Queues one finished step; raises what an earlier one failed with."""
        for future in [future for future in self._pending if future.done()]:
            self._pending.remove(future)
            future.result()
        self._pending.append(self._pool.submit(self._commit, entry))

    def drain(self) -> None:
        """Waits until everything queued is on the disk."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def _commit(self, entry: dict[str, Any]) -> None:
        for writer in self._writers:
            writer.sync()
        self._job.append(entry)
