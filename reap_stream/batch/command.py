"""`reap-stream batch`: reads the jobs, checks them all, runs them, sums up."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from reap_stream.batch.asking import checked, with_known
from reap_stream.batch.evaluations import Evaluations
from reap_stream.batch.job import Job
from reap_stream.batch.jobs_file import read_jobs
from reap_stream.batch.lines import SCORES_FILE, companions, eval_line, sharing_key, writing_line
from reap_stream.batch.outcomes import Board
from reap_stream.batch.places import check_places
from reap_stream.batch.process import interrupted_by_signals
from reap_stream.batch.records import Records
from reap_stream.batch.running import Runner
from reap_stream.batch.steps import steps_of
from reap_stream.batch.summary import Summary
from reap_stream.checkpoint.disk import output_errors
from reap_stream.checkpoint.lock import Lock
from reap_stream.errors import InterruptedRunError, OutputError, ReapStreamError, UsageError


def batch(arguments: argparse.Namespace) -> None:
    """`reap-stream batch`.

    Raises:
        UsageError: a job that would be refused; none was started.
        OutputError: a job failed.
        InterruptedRunError: it was told to end.
    """
    jobs = read_jobs(arguments.jobs)
    work = arguments.work or arguments.jobs.absolute().parent / f"{arguments.jobs.stem}.reap-batch"
    work = work.absolute()
    check_places(jobs, work)
    if arguments.dry_run:
        jobs = _prepared(jobs, Records(work))[0]
        for line in planned_lines(jobs, Evaluations(work / "evaluations")):
            _say(line)
        return
    with interrupted_by_signals(), _locked(work):
        _run(arguments, jobs, Records(work))


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Keeps other batches out of the directory, which goes again if nothing came to be in it."""
    with output_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock.acquire(work / "lock")
    except UsageError as error:
        said = str(error).partition(" is working on this")[0]
        raise UsageError(f"{said} is working on this batch: wait for it, or stop it") from error
    try:
        yield
    finally:
        with suppress(OSError):
            if [path.name for path in work.iterdir()] == ["lock"]:
                (work / "lock").unlink()
                work.rmdir()
        lock.release()


def _prepared(jobs: Sequence[Job], records: Records) -> tuple[list[Job], Runner]:
    """The jobs, checked, and what runs them."""
    evaluations = Evaluations(records.directory / "evaluations")
    statuses = {job.name: records.status(job) for job in jobs}
    known = with_known(jobs, records, statuses)
    found, notes = checked(known, records, statuses, evaluations)
    for note in notes:
        _tell(f"note: {note}")
    return found, Runner(records, statuses, Board(found), evaluations, _tell)


def _run(arguments: argparse.Namespace, jobs: Sequence[Job], records: Records) -> None:
    jobs, runner = _prepared(jobs, records)
    summary = Summary(runner.board, records, runner.evaluations)
    runner.board.changed = _quiet(summary.write)
    runner.board.changed()
    interrupted = False
    try:
        runner.run_all(jobs, fail_fast=arguments.fail_fast)
    except KeyboardInterrupt:
        interrupted = True
    runner.board.close(interrupted=interrupted)
    _say(summary.text() if arguments.json else summary.table())
    if interrupted:
        raise InterruptedRunError("interrupted. The same command goes on.")
    failed = runner.board.failed
    if failed:
        message = (
            f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}; logs are in"
            f" {records.directory}; the same command tries them again"
        )
        raise OutputError(message)


def _quiet(write: Callable[[], None]) -> Callable[[], None]:
    """Writing a summary that is no reason to end a job if the disk refuses; it is said once."""
    said = set[str]()

    def attempt() -> None:
        try:
            write()
        except ReapStreamError as error:
            if not said:
                _tell(f"note: the summary could not be written: {error}")
            said.add(str(error))

    return attempt


def planned_lines(jobs: Sequence[Job], evaluations: Evaluations) -> Iterator[str]:
    """The commands of all jobs, if every one of them succeeds and none was begun."""
    if jobs[0].base != Path.cwd():
        yield shlex.join(("cd", str(jobs[0].base)))
    leaders: dict[object, Path] = {}
    for job in jobs:
        key = sharing_key(job)
        yield _shown(writing_line(job, leaders.get(key)))
        if key is not None:
            leaders.setdefault(key, job.directories[0] / SCORES_FILE)
        yield from (_shown(s.line) for s in steps_of(job, evaluations) if s.kind == "verify")
        together = companions(job, jobs)
        if together[-1] is not job:
            continue
        if job.evaluation:
            yield _shown(eval_line(together, evaluations.scratch))
        for other in together:
            steps = steps_of(other, evaluations)
            yield from (_shown(s.line) for s in steps if s.kind not in ("verify", "eval"))


def _shown(line: Sequence[str]) -> str:
    return f"reap-stream {shlex.join(line)}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - this is the command line


def _say(text: str) -> None:
    print(text)  # noqa: T201 - this is the command line
