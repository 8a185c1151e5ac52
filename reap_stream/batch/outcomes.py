"""What becomes of each job, kept up to date while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from reap_stream.batch.job import Job

State = Literal["waiting", "running", "done", "skipped", "failed", "interrupted", "not run"]

_UNDONE: Final = {
    "verify": "not verified",
    "eval": "not evaluated",
    "report": "no report",
    "card": "card not rendered",
    "upload": "not uploaded",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: the job.
        state: ``done``, ``skipped`` where an earlier start had done it, ``failed``, ``interrupted``
            or ``not run``; before that ``waiting`` or ``running``.
        step: its last command, e.g. ``prune`` or ``upload``; empty: none was run.
        how: ``prune`` or ``compact``; empty where it was written before.
        written: its checkpoints are there.
        exit_code: of its last command; None: none was run.
        error: what it said at its end, where it failed.
    """

    job: Job
    state: State = "waiting"
    step: str = ""
    how: str = ""
    written: bool = False
    exit_code: int | None = None
    error: str = ""

    @property
    def said(self) -> str:
        """The state in words, with how far a job came that is not done."""
        if not self.written or self.state in ("done", "skipped", "running"):
            return self.state
        undone = _UNDONE.get(self.step) if self.state in ("failed", "interrupted") else None
        return f"written, {undone or self.state}"


class Board:
    """The outcomes of all jobs, in their order.

    Args:
        jobs: all jobs.
        changed: is called after every change.
    """

    def __init__(self, jobs: Sequence[Job], changed: Callable[[], None] = lambda: None) -> None:
        self._found = {job.name: Outcome(job) for job in jobs}
        self.changed = changed

    def __iter__(self) -> Iterator[Outcome]:
        return iter(self._found.values())

    def __getitem__(self, job: Job) -> Outcome:
        return self._found[job.name]

    def set(self, job: Job, **changes: Any) -> Outcome:
        """Changes what is known of a job."""
        self._found[job.name] = replace(self[job], **changes)
        self.changed()
        return self[job]

    def is_open(self, job: Job) -> bool:
        """Whether something may still be done with a job."""
        return self[job].state in ("waiting", "running")

    @property
    def failed(self) -> list[str]:
        """Names of jobs that failed."""
        return [outcome.job.name for outcome in self if outcome.state == "failed"]

    def close(self, *, interrupted: bool) -> None:
        """Says what becomes of jobs that are not done when the batch ends."""
        for outcome in self:
            if interrupted and outcome.state == "running":
                self.set(outcome.job, state="interrupted")
            elif self.is_open(outcome.job):
                self.set(outcome.job, state="not run")
