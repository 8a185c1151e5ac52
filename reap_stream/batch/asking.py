"""Has all jobs checked before the first one starts, and fills in what is known of them since."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reap_stream.batch.evaluations import Evaluations
from reap_stream.batch.job import Job
from reap_stream.batch.lines import eval_line, writing_line
from reap_stream.batch.places import check_targets
from reap_stream.batch.process import safe_environment
from reap_stream.batch.records import Records, Status
from reap_stream.batch.room import check_room
from reap_stream.batch.steps import pending
from reap_stream.errors import OutputError, UsageError

Answers = Sequence[dict[str, Any]]


def with_known(
    jobs: Sequence[Job], records: Records, statuses: Mapping[str, Status]
) -> list[Job]:  # fmt: skip
    """The jobs with the targets and the commits that earlier starts have found.

    A model on the Hub stays at the commit at which its first job was begun.
    """
    commits: dict[str, str] = {}
    found = []
    for job in jobs:
        record = records.read(job) if statuses[job.name] != "new" else None
        if record is None:
            found.append(job)
            continue
        commits.setdefault(job.model, record.commit)
        found.append(replace(job, commit=record.commit, keeps=record.keeps))
    return [replace(job, commit=job.commit or commits.get(job.model, "")) for job in found]


def checked(
    jobs: Sequence[Job], records: Records, statuses: Mapping[str, Status], evaluations: Evaluations
) -> tuple[list[Job], list[str]]:
    """The jobs with their targets and commits, and what to know of them.

    Raises:
        UsageError: some cannot be run (the message has them all), or publish in one place.
        NoRoomError: a disk has no room for all.
    """
    questions = [_question(job, records, statuses[job.name], evaluations) for job in jobs]
    # What is done needs no check: its model may be gone by now.
    asked = [job for job, question in zip(jobs, questions, strict=True) if question]
    answers = ask([question for question in questions if question], jobs[0].base)
    found = dict(zip((job.name for job in asked), answers, strict=True))
    errors = [
        f"job {name!r}: {answer['error']}" for name, answer in found.items() if "error" in answer
    ]
    if errors:
        raise UsageError("\n  ".join(["no job was started:", *errors]))
    known = list(_filled(jobs, found))
    check_targets(known)
    check_room([(job, found[job.name]) for job in asked if statuses[job.name] == "new"])
    notes = [f"job {job.name!r}: {n}" for job in asked for n in found[job.name]["notes"]]
    return known, [*notes, *_evict_notes(known)]


def _question(
    job: Job, records: Records, status: Status, evaluations: Evaluations
) -> dict[str, Any] | None:
    """What is to be checked of a job; None: nothing."""
    record = None if status == "new" else records.read(job)
    marks = () if record is None else record.steps
    known = record is not None and status == "done"
    kinds = {step.kind for step in pending(job, marks, evaluations)} if known else _all_kinds(job)
    if known and not kinds:
        return None
    if kinds & {"eval", "card"} and job.upload is not None:
        # What changes the card is sent again.
        kinds.add("upload")
    # The outputs that it will evaluate are not there yet.
    line = eval_line([replace(job, keeps=())], Path("eval.json")) if "eval" in kinds else None
    begun = records.read(job)
    return {
        "line": None if known else writing_line(job),
        "new": status == "new",
        "keeps": job.keeps,
        "overwrite": job.overwrite,
        "eval": line,
        "text": (job.evaluation or {}).get("text", ()) if "eval" in kinds else (),
        "calibration": job.options["calibration"],
        "report": str(job.report) if "report" in kinds else None,
        "own_report": begun is not None and begun.report == str(job.report),
        "base_model": job.base_model if "card" in kinds else None,
        "upload": job.upload if "upload" in kinds else None,
    }


def _all_kinds(job: Job) -> set[str]:
    wanted = {
        "eval": bool(job.evaluation),
        "report": job.report is not None,
        "card": job.card,
        "upload": job.upload is not None,
    }
    return {kind for kind, is_wanted in wanted.items() if is_wanted}


def ask(questions: Sequence[Mapping[str, Any]], base: Path) -> Answers:
    """Answers of `reap_stream.batch.checking`, which has what it imports to itself.

    Raises:
        OutputError: it ended without an answer.
    """
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
            said = done.stderr.strip()[-2000:]
            raise OutputError(f"the jobs could not be checked: exit {done.returncode}: {said}")
        answers: Answers = json.loads(path.read_text(encoding="utf-8"))
    return answers


def _filled(jobs: Sequence[Job], found: Mapping[str, Mapping[str, Any]]) -> Iterator[Job]:
    """The jobs with what their answers say; jobs of one model have one commit of it."""
    commits: dict[str, str] = {}
    for job in jobs:
        answer = found.get(job.name, {})
        commit = commits.setdefault(job.model, job.commit or answer.get("commit", ""))
        keeps = tuple(answer.get("keeps", job.keeps))
        yield replace(job, commit=job.commit or commit, keeps=keeps)


def _evict_notes(jobs: Sequence[Job]) -> Iterator[str]:
    """Says where `evict` costs a download that is done once without it."""
    first: dict[str, str] = {}
    for job in jobs:
        if not job.options.get("evict"):
            continue
        later = [
            key for key, wanted in (("verify", job.verify), ("eval", job.evaluation)) if wanted
        ]
        before = first.setdefault(job.source, job.name)
        what = [f"after job {before!r}"] if before != job.name else []
        what += [f"for {key}" for key in later]
        if what:
            yield (
                f"job {job.name!r}: evict deletes what was fetched behind its use, so"
                f" {job.source} is fetched again: {', '.join(what)}"
            )
