"""A job as one of its ranks sees it: rank 0 holds it and keeps its records, the others look on.

All of a job's directory but the bytes of kept weights and each rank's hidden states is written by
rank 0, which holds the lock. The others hold a second one together, so that no other job begins there
while one of them has not noticed yet that rank 0 died. All must see one directory, which on several
machines lies on a file system they share.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from typing_extensions import Self

from reap_stream.checkpoint.disk import output_errors
from reap_stream.checkpoint.job import RANKS_NAME, Job, job_directory
from reap_stream.checkpoint.lock import Lock
from reap_stream.errors import ReapStreamError, UsageError
from reap_stream.ranks.base import ALONE, Ranks
from reap_stream.ranks.peers import Peer

# Network file systems remember for up to a minute that a file was not there.
_SHARING_SECONDS = 90.0
_LOOK_SECONDS: Final = 0.25


class SharedJob:
    """A job's directory and journal; a context manager that lets go what this rank holds of it.

    Args:
        ranks: the ranks.
        output: where the result will lie, links followed.
        own: the job itself on rank 0, None on the others.
        entries: the journal's lines, as rank 0 found them.
        is_published: the result is in its place and only tidying up is left to do.
    """

    def __init__(
        self,
        ranks: Ranks,
        output: Path,
        own: Job | None,
        entries: list[dict[str, Any]],
        *,
        is_published: bool,
    ) -> None:
        self.ranks = ranks
        self.directory = job_directory(output)
        self.own = own
        self.entries = entries
        self.is_published = is_published
        self._joined: Lock | None = None

    def __enter__(self) -> Self:
        """Nothing more to open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Lets go the lock."""
        if self.own is not None:
            self.own.close()
        self._let_go()

    def _let_go(self) -> None:
        if self._joined is not None:
            self._joined.release()

    @property
    def leads(self) -> bool:
        """Whether this rank keeps the job's records."""
        return self.own is not None

    def path(self, *parts: str) -> Path:
        """A path inside the job's directory."""
        return self.directory.joinpath(*parts)

    def append(self, entry: dict[str, Any]) -> None:
        """Adds a line to the journal, if this rank keeps it; see `Job.append`."""
        if self.own is not None:
            self.own.append(entry)

    def join(self) -> None:
        """Holds the lock of ranks that do not lead."""
        self._joined = None if self.leads else Lock.join(self.path(RANKS_NAME))

    def leave(self) -> None:
        """Lets go the lock of ranks that do not lead, once all have nothing left to write there."""
        self._let_go()
        self.ranks.wait_for_all()

    def discard(self) -> None:
        """Deletes the job's directory, if this rank keeps it."""
        if self.own is not None:
            self.own.discard()


def open_shared(
    output: Path,
    settings: Mapping[str, Any],
    ranks: Ranks = ALONE,
    *,
    resume_with: frozenset[str] | None = None,
    overwrite: bool = False,
) -> SharedJob:
    """A job for all ranks, made or taken up by rank 0.

    Args:
        output: where the result will lie.
        settings: as `Job.create` has them.
        ranks: the ranks.
        resume_with: settings that may differ from those of the half-done job to go on with; None:
            begin a new one.
        overwrite: as `Job.create` has it.

    Raises:
        ReapStreamError: as `Job.create` and `Job.resume`, on all ranks.
        UsageError: a rank does not see the directory.
    """
    own: Job | None = None
    if ranks.leads and resume_with is not None:
        own = Job.resume(output, settings, resume_with)
    elif ranks.leads:
        own = Job.create(output, settings, overwrite=overwrite)
    facts = {} if own is None else {"entries": own.entries, "is_published": own.is_published}
    try:
        known = ranks.first(facts)
        job = SharedJob(ranks, output.resolve(), own, **known)
        if ranks.size > 1 and not job.is_published:
            _check_shared(job)
    except BaseException as error:
        if own is not None:
            _give_up(own, fresh=resume_with is None and isinstance(error, ReapStreamError))
        raise
    return job


def _give_up(own: Job, *, fresh: bool) -> None:
    """A new job that the ranks cannot do is not left for `--resume`."""
    if fresh:
        own.discard()
    own.close()


def _check_shared(job: SharedJob) -> None:
    """Makes sure that all ranks see the directory that rank 0 writes to.

    Raises:
        UsageError: this rank does not.
    """
    path = job.path(RANKS_NAME)
    text = secrets.token_hex(16)
    if job.leads:
        with output_errors(path):
            path.write_text(text, encoding="ascii")
    text = job.ranks.first(text)
    until = time.monotonic() + _SHARING_SECONDS
    while not _holds(path, text):
        if time.monotonic() >= until:
            message = (
                f"{job.directory}: what rank 0 writes there is not seen by rank {job.ranks.rank} "
                f"({Peer.here().name}): on several machines --output must name one directory of a "
                "file system they share; or let each machine `observe` rows of its own and `merge` "
                "the scores"
            )
            raise UsageError(message)
        time.sleep(_LOOK_SECONDS)
    job.join()
    job.ranks.wait_for_all()


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="ascii", errors="replace") == text
    except OSError:
        return False
