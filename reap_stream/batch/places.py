"""Where jobs read and write: nothing that one writes may be what another reads or writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Final

from reap_stream.batch.job import Job
from reap_stream.batch.steps import with_keep
from reap_stream.errors import UsageError

_ROWS: Final = re.compile(r":[0-9]+\Z")


def check_places(jobs: Sequence[Job], work: Path) -> None:
    """Refuses outputs that are one another's, or touch what is read, or the batch's own directory.

    Args:
        jobs: all jobs.
        work: the batch's own directory.

    Raises:
        UsageError: two places are one, or one lies in the other.
    """
    for one, other in combinations(jobs, 2):
        if _touch(one.output, other.output):
            raise UsageError(
                f"jobs {one.name!r} and {other.name!r}: their outputs {one.output} and"
                f" {other.output} are one, or one lies in the other"
            )
    for job in jobs:
        if _touch(job.output, work):
            raise UsageError(
                f"job {job.name!r}: its output {job.output} and {work}, where logs go, are one, or"
                " one lies in the other; give another --work"
            )
        for other in jobs:
            _check_pair(job, other)


def check_targets(jobs: Sequence[Job]) -> None:
    """Refuses pages and repositories of two checkpoints that are one.

    Args:
        jobs: all jobs; their targets are known.

    Raises:
        UsageError: the second would replace the first.
    """
    users: dict[tuple[str, ...], str] = {}
    for job in jobs:
        for keep in job.keeps:
            for what in _published(job, keep):
                before = users.setdefault(what, job.name)
                if before != job.name:
                    raise UsageError(
                        f"jobs {before!r} and {job.name!r}: both have {what[0]} {what[1]}: put"
                        " {model}, {method} or {keep} into it"
                    )


def _published(job: Job, keep: int) -> Iterator[tuple[str, ...]]:
    if job.report is not None:
        yield ("report", with_keep(str(job.report), keep))
    if job.upload is not None:
        yield (
            "upload",
            with_keep(job.upload, keep),
            *(job.upload_options or {}).get("revision", ()),
        )


def _check_pair(job: Job, other: Job) -> None:
    """Refuses an output that touches another job's model, or holds its data or its report."""
    source = Path(other.model)
    if source.is_absolute() and _touch(job.output, source):
        raise UsageError(
            f"job {job.name!r}: its output {job.output} and the model {source} are one, or one lies"
            " in the other"
        )
    for path in _files(other):
        if path.resolve().is_relative_to(job.output.resolve()):
            raise UsageError(
                f"job {job.name!r}: its output {job.output} is written as a whole, and {path} of job"
                f" {other.name!r} lies in it"
            )


def _files(job: Job) -> Iterator[Path]:
    """What a job reads beside its model, as far as it is there, and its report."""
    texts = (job.evaluation or {}).get("text", ())
    for text in (*job.options.get("calibration", ()), *texts):
        for name in (text, _ROWS.sub("", text)):
            # A SPEC may be no path at all, and longer than any.
            with suppress(OSError):
                if (job.base / name).is_file():
                    yield job.base / name
    if job.report is not None:
        yield job.report


def _touch(one: Path, other: Path) -> bool:
    one, other = one.resolve(), other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)
