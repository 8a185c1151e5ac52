"""`reap-stream batch`: reads the jobs, checks them all, runs them, sums up."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from reap_stream.batch.jobs_file import Job, read_jobs
from reap_stream.batch.lines import (
    SCORES_FILE,
    sharing_key,
    upload_line,
    verify_line,
    writing_line,
)
from reap_stream.batch.records import Records, Status
from reap_stream.batch.running import Outcome, Runner, safe_environment
from reap_stream.batch.summary import document, table
from reap_stream.checkpoint.atomic import write_atomically
from reap_stream.checkpoint.disk import free_nbytes, on_one_disk, output_errors
from reap_stream.checkpoint.lock import Lock
from reap_stream.errors import InterruptedRunError, NoRoomError, OutputError, UsageError
from reap_stream.hub.names import parse_hub_name

Answers = Sequence[dict[str, Any]]


def batch(arguments: argparse.Namespace) -> None:
    """`reap-stream batch`.

    Raises:
        UsageError: a job that would be refused; none was started.
        OutputError: a job failed.
        InterruptedRunError: it was told to end.
    """
    jobs = read_jobs(arguments.jobs)
    work = arguments.work or arguments.jobs.absolute().parent / f"{arguments.jobs.stem}.reap-batch"
    _check_places(jobs, work.absolute())
    records = Records(work.absolute())
    statuses = {job.name: records.status(job) for job in jobs}
    answers = _checked(jobs, statuses)
    if arguments.dry_run:
        for line in planned_lines(jobs, answers):
            _say(f"reap-stream {shlex.join(line)}")
        return
    with output_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    lock = Lock.acquire(work / "lock")
    try:
        _run(arguments, jobs, Runner(records, statuses, _tell), records)
    finally:
        lock.release()


def _run(
    arguments: argparse.Namespace, jobs: Sequence[Job], runner: Runner, records: Records
) -> None:
    started, outcomes, interrupted = time.monotonic(), list[Outcome](), False
    try:
        for outcome in runner.run_all(jobs, fail_fast=arguments.fail_fast):
            outcomes.append(outcome)
    except KeyboardInterrupt:
        interrupted = True
        current, *others = jobs[len(outcomes) :]
        outcomes += [Outcome(current, "interrupted"), *(Outcome(job, "not run") for job in others)]
    found = document(outcomes, records.directory, time.monotonic() - started)
    text = json.dumps(found, indent=2, ensure_ascii=False)
    raw = f"{text}\n".encode()
    write_atomically(records.directory / "summary.json", [raw], len(raw))
    _say(text if arguments.json else table(found))
    if interrupted:
        raise InterruptedRunError("interrupted. The same command goes on.")
    failed = [outcome.job.name for outcome in outcomes if outcome.state == "failed"]
    if failed:
        message = (
            f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}; logs are in"
            f" {records.directory}; the same command tries them again"
        )
        raise OutputError(message)


def planned_lines(jobs: Sequence[Job], answers: Answers) -> Iterator[list[str]]:
    """The commands of all jobs, if every one of them succeeds and none was begun."""
    leaders: dict[object, Path] = {}
    for job, answer in zip(jobs, answers, strict=True):
        directories = [job.output]
        if job.has_targets:
            directories = [job.output / f"keep-{keep}" for keep in answer["keeps"]]
        key = sharing_key(job)
        yield writing_line(job, leaders.get(key))
        if key is not None:
            leaders.setdefault(key, directories[0] / SCORES_FILE)
        for directory in directories:
            if job.verify:
                yield verify_line(job, directory)
            if job.upload is not None:
                yield upload_line(job, directory)


def _check_places(jobs: Sequence[Job], work: Path) -> None:
    """Refuses outputs that are one another's, or touch a source or the batch's own directory."""
    for one, other in combinations(jobs, 2):
        if _touch(one.output, other.output):
            raise UsageError(
                f"jobs {one.name!r} and {other.name!r}: their outputs {one.output} and"
                f" {other.output} are one, or one lies in the other"
            )
    for job in jobs:
        for other in jobs:
            source = job.base / other.model
            if parse_hub_name(other.model) is None and _touch(job.output, source):
                raise UsageError(
                    f"job {job.name!r}: its output {job.output} and the model {source} are one, or"
                    " one lies in the other"
                )
        if _touch(job.output, work):
            raise UsageError(
                f"job {job.name!r}: its output {job.output} and {work}, where logs go, are one, or"
                " one lies in the other; give another --work"
            )


def _touch(one: Path, other: Path) -> bool:
    one, other = one.resolve(), other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)


def _checked(jobs: Sequence[Job], statuses: dict[str, Status]) -> Answers:
    """What is planned of each job.

    Raises:
        UsageError: some cannot be run; the message has them all.
        NoRoomError: the disk has no room for all.
    """
    # What is done needs no check: its model may be gone by now.
    open_jobs = [job for job in jobs if statuses[job.name] != "done"]
    asked = [{"line": writing_line(job), "new": statuses[job.name] == "new"} for job in open_jobs]
    found = dict(zip((job.name for job in open_jobs), _ask(asked, jobs[0].base), strict=True))
    errors = [
        f"job {name!r}: {answer['error']}" for name, answer in found.items() if "error" in answer
    ]
    if errors:
        raise UsageError("\n  ".join(["no job was started:", *errors]))
    _check_room([job for job in open_jobs if statuses[job.name] == "new"], found)
    return [found.get(job.name, {"keeps": _kept(job)}) for job in jobs]


def _kept(job: Job) -> list[int]:
    """The targets of a job that is done."""
    names = [path.name for path in job.directories()] if job.has_targets else []
    return [int(name.removeprefix("keep-")) for name in names]


def _ask(questions: Sequence[dict[str, Any]], base: Path) -> Answers:
    """Answers of `reap_stream.batch.checking`, which has what it imports to itself."""
    if not questions:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "answers.json"
        done = subprocess.run(
            [sys.executable, "-m", "reap_stream.batch.checking", str(path)],
            input=json.dumps(questions),
            cwd=base,
            env=safe_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise OutputError(f"the jobs could not be checked: {done.stderr.strip()[-2000:]}")
        answers: Answers = json.loads(path.read_text(encoding="utf-8"))
    return answers


def _check_room(jobs: Sequence[Job], found: dict[str, dict[str, Any]]) -> None:
    """Refuses a batch whose outputs, all of them, have no room on their disks."""
    left = list(jobs)
    while left:
        here = [job for job in left if on_one_disk(job.output, left[0].output)]
        left = [job for job in left if job not in here]
        needed = sum(found[job.name]["disk_nbytes"] for job in here)
        free = free_nbytes(here[0].output)
        if needed > free:
            names = ", ".join(job.name for job in here)
            raise NoRoomError(
                f"jobs {names}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free at"
                f" {here[0].output.parent}: make room, or divide the jobs"
            )


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - this is the command line


def _say(text: str) -> None:
    print(text)  # noqa: T201 - this is the command line
