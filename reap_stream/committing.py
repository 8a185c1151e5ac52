"""Makes finished layers durable while the next one runs.

A layer counts as finished when its bytes and its scores are on the disk and its line is in the
journal, in that order. Waiting for the disk is left to one thread, so the pass goes on meanwhile.

Where several ranks write, each brings its own part onto the disk, and rank 0 writes the line when all
have said so. They say it in the exchange that ends the next layer, so the thread never talks to others.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from typing_extensions import Self

from reap_stream.checkpoint.output import OutputWriter
from reap_stream.errors import ReapStreamError
from reap_stream.shared_job import SharedJob


class Committer:
    """Syncs writers and appends to a job's journal, in order, in the background."""

    def __init__(self, job: SharedJob, writers: Sequence[OutputWriter]) -> None:
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
        self._check_done()
        self._pending.append(self._pool.submit(self._commit, entry))

    def drain(self) -> None:
        """Waits until everything queued is on the disk."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def _check_done(self) -> None:
        for future in [future for future in self._pending if future.done()]:
            self._pending.remove(future)
            future.result()

    def _commit(self, entry: dict[str, Any]) -> None:
        self._sync()
        self._job.append(entry)

    def _sync(self) -> None:
        for writer in self._writers:
            writer.sync()


class SharedCommitter(Committer):
    """The same for several ranks; all of them commit the same steps in the same order."""

    def __init__(self, job: SharedJob, writers: Sequence[OutputWriter]) -> None:
        super().__init__(job, writers)
        self._ranks = job.ranks
        # Steps whose lines are not on their way yet, and for each whether this rank's part is done.
        self._steps: deque[tuple[dict[str, Any], Future[None]]] = deque()

    def commit(self, entry: dict[str, Any]) -> None:
        """Queues one finished step and notes earlier ones that all ranks brought onto the disk.

        Raises:
            ReapStreamError: the ranks finished different things, so they did not see the same
                numbers.
        """
        self._check_done()
        self._steps.append((entry, self._pool.submit(self._sync)))
        self._note(entry)

    def drain(self) -> None:
        """Waits until everything that any rank queued is on the disk."""
        if self._steps:
            for _, future in self._steps:
                future.result()
            self._note(None)
        super().drain()

    def _note(self, entry: dict[str, Any] | None) -> None:
        done = 0
        for _, future in self._steps:
            if not future.done():
                break
            future.result()
            done += 1
        answers = self._ranks.share({"done": done, "entry": entry})
        for rank, answer in enumerate(answers):
            if answer["entry"] != answers[0]["entry"]:
                message = (
                    f"rank {rank} finished {_short(answer['entry'])} where rank 0 finished "
                    f"{_short(answers[0]['entry'])}: from the same sums they must choose the same "
                    "experts; this is a fault of this package or of a machine's memory: report it"
                )
                raise ReapStreamError(message)
        for _ in range(min(answer["done"] for answer in answers)):
            step, _ = self._steps.popleft()
            self._pending.append(self._pool.submit(self._job.append, step))


def open_committer(job: SharedJob, writers: Sequence[OutputWriter]) -> Committer:
    """What makes a job's finished layers durable, as many ranks as it has."""
    return Committer(job, writers) if job.ranks.size == 1 else SharedCommitter(job, writers)


def _short(entry: dict[str, Any] | None) -> str:
    return json.dumps(entry)[:300]
