"""Runs one job after another, each command in a process of its own, with a log for each job."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal

from reap_stream.batch.jobs_file import Job
from reap_stream.batch.lines import (
    scores_of,
    sharing_key,
    upload_line,
    verify_line,
    writing_line,
)
from reap_stream.batch.records import Records, Status, new_record

State = Literal["done", "skipped", "failed", "interrupted", "not run"]
_PATIENCE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: the job.
        state: ``done``, ``skipped`` where an earlier start had done it, ``failed``, ``interrupted``
            or ``not run``.
        how: ``prune`` or ``compact``; empty where it was not run.
        seconds: wall time.
        exit_code: of its last command; None: none was run.
        error: what it said at its end, where it failed.
    """

    job: Job
    state: State
    how: str = ""
    seconds: float = 0.0
    exit_code: int | None = None
    error: str = ""


class Runner:
    """Runs jobs.

    Args:
        records: what is remembered of them, and where logs go.
        statuses: how the writing of each job stands, by name.
        say: tells people what happens.
    """

    def __init__(
        self, records: Records, statuses: dict[str, Status], say: Callable[[str], None]
    ) -> None:
        self._records = records
        self._statuses = statuses
        self._say = say

    def run_all(self, jobs: Sequence[Job], *, fail_fast: bool) -> Iterator[Outcome]:
        """Runs all jobs in their order.

        Args:
            jobs: the jobs, checked.
            fail_fast: stop at the first that fails.
        """
        for number, job in enumerate(jobs):
            place = f"[{number + 1}/{len(jobs)}] {job.name}"
            outcome = self._run(job, jobs, place)
            why = f": {outcome.error}" if outcome.error else ""
            self._say(f"{place}: {outcome.state}{why}")
            yield outcome
            if fail_fast and outcome.state == "failed":
                yield from (Outcome(other, "not run") for other in jobs[number + 1 :])
                return

    def log(self, job: Job) -> Path:
        """Where what a job prints goes."""
        return self._records.directory / f"{job.name}.log"

    def _run(self, job: Job, jobs: Sequence[Job], place: str) -> Outcome:
        started, outcome = time.monotonic(), Outcome(job, "skipped")
        for step, line in self._steps(job, jobs):
            self._say(f"{place}: {step}")
            code = run_line(line, job.base, self.log(job))
            how = line[0] if line[0] in ("prune", "compact") else outcome.how
            outcome = replace(outcome, state="done", how=how, exit_code=code)
            if code != 0:
                error = f"exit {code}: {_last_words(self.log(job))}"
                outcome = replace(outcome, state="failed", error=error)
                break
        return replace(outcome, seconds=time.monotonic() - started)

    def _steps(self, job: Job, jobs: Sequence[Job]) -> Iterator[tuple[str, list[str]]]:
        """What is still to be done, each with its command; asked for the next, it was."""
        record = self._records.read(job)
        status = self._statuses[job.name]
        if status != "done" or record is None:
            if status == "new" or record is None:
                scores = self._shared_scores(job, jobs)
                record = self._records.write(job, new_record(job, scores))
            scores = None if record.scores is None else Path(record.scores)
            line = writing_line(job, scores, resume=status == "resume")
            yield f"{line[0]} → {job.output}", line
        if not record.written:
            record = self._records.write(job, replace(record, written=True))
        for directory in job.directories():
            for line in _after(job, directory):
                step = f"{line[0]} {line[2] if line[0] == 'upload' else directory.name}"
                if step not in record.steps:
                    yield step, line
                    record = self._records.add_step(job, record, step)

    def _shared_scores(self, job: Job, jobs: Sequence[Job]) -> Path | None:
        """Scores of a finished job that has its reading in common with this one."""
        key = sharing_key(job)
        if key is None:
            return None
        for other in jobs:
            if other is not job and sharing_key(other) == key and self._is_written(other):
                return scores_of(other)
        return None

    def _is_written(self, job: Job) -> bool:
        record = self._records.read(job)
        return record is not None and record.written and self._records.status(job) == "done"


def _after(job: Job, directory: Path) -> Iterator[list[str]]:
    if job.verify:
        yield verify_line(job, directory)
    if job.upload is not None:
        yield upload_line(job, directory)


def run_line(line: Sequence[str], base: Path, log: Path) -> int:
    """Runs one command to its end.

    Args:
        line: its arguments.
        base: directory that it runs in.
        log: file that gets what it prints, behind what is there.

    Returns:
        Its exit status, negative where a signal ended it.

    Raises:
        KeyboardInterrupt: this process was told to end; so was the command.
    """
    with log.open("ab") as stream, _interrupted_by_signals():
        stream.write(f"$ reap-stream {shlex.join(line)}\n".encode())
        stream.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "reap_stream.batch.child", str(os.getpid()), *line],
            cwd=base,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=safe_environment(),
            # Else a Ctrl-C reaches it twice: from the terminal, and from here.
            start_new_session=True,
        )
        try:
            return process.wait()
        except BaseException:
            _end(process)
            raise


def safe_environment() -> dict[str, str]:
    """The environment, in which modules in the working directory are not imported."""
    return {**os.environ, "PYTHONSAFEPATH": "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Lets a command tidy up, and kills it if it does not."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_PATIENCE_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Has what ends a process quietly interrupt it instead, unless it is told to ignore it."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    for number, handler in before.items():
        if handler == signal.SIG_DFL:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_words(log: Path) -> str:
    """The last line that a command said, without the program's name."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 10_000))
        lines = stream.read().decode(errors="replace").splitlines()
    said = [line for line in lines if line.strip() and not line.startswith("$ ")]
    own = [line for line in said if line.startswith("reap-stream: ")]
    return (own or said or ["it said nothing"])[-1].removeprefix("reap-stream: ")
