"""What follows the writing of a checkpoint: each step with its command, and what it makes out of date.

verify   the bytes against the source
eval     the source and all checkpoints that share it, in one reading
report   a page
card     README.md anew, with the evaluation
upload   last
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from reap_stream.batch.evaluations import Evaluations
from reap_stream.batch.job import Job, as_options
from reap_stream.batch.lines import card_line, report_line, upload_line, verify_line

Mark = tuple[str, str, str]
"""A step that was done: its kind, the checkpoint's name, and what it was done with."""

# What shows or sends what another step changes.
_OUTDATED: Final[Mapping[str, frozenset[str]]] = {
    "eval": frozenset({"report", "card", "upload"}),
    "card": frozenset({"upload"}),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one checkpoint.

    Attributes:
        kind: ``verify``, ``eval``, ``report``, ``card`` or ``upload``.
        directory: the checkpoint.
        detail: what it is done with; with something else it is done again.
        line: its command; empty of ``eval``, which is done for many at once.
    """

    kind: str
    directory: Path
    detail: str
    line: tuple[str, ...]

    @property
    def mark(self) -> Mark:
        """What is noted once it is done."""
        return (self.kind, self.directory.name, self.detail)


def steps_of(job: Job, evaluations: Evaluations) -> Iterator[Step]:
    """All steps of a job, in their order; its targets are known."""
    for keep, directory in zip(job.keeps, job.directories, strict=True):
        evaluated = bool(job.evaluation)
        if job.verify:
            yield Step("verify", directory, "", tuple(verify_line(job, directory)))
        if evaluated:
            yield Step("eval", directory, _text_of(job), ())
        if job.report is not None:
            page = Path(with_keep(str(job.report), keep))
            found = evaluations.of_job(job) if evaluated else None
            yield Step("report", directory, str(page), tuple(report_line(directory, page, found)))
        if job.card:
            found = evaluations.of_checkpoint(job, directory) if evaluated else None
            line = tuple(card_line(job, directory, found))
            yield Step("card", directory, job.base_model or "", line)
        if job.upload is not None:
            repository = with_keep(job.upload, keep)
            line = tuple(upload_line(job, directory, repository))
            yield Step("upload", directory, shlex.join(line[2:]), line)


def _text_of(job: Job) -> str:
    """What decides an evaluation."""
    keys = tuple(key for key in job.evaluation or {} if key != "memory")
    return shlex.join(as_options(job.evaluation, keys))


def with_keep(text: str, keep: int) -> str:
    """The text of one target."""
    return text.replace("{keep}", str(keep))


def pending(job: Job, marks: tuple[Mark, ...], evaluations: Evaluations) -> list[Step]:
    """Steps that are still to be done; none of a checkpoint that was uploaded and deleted since."""
    # Somebody may have tidied up: report and card need what was found.
    lost = bool(job.evaluation) and not evaluations.of_job(job).is_file()
    return [
        step
        for step in steps_of(job, evaluations)
        if (step.mark not in marks or (lost and step.kind == "eval"))
        and (step.directory.exists() or not was_done("upload", step.directory, marks))
    ]


def was_done(kind: str, directory: Path, marks: tuple[Mark, ...]) -> bool:
    """Whether a step of that kind was done with a checkpoint."""
    return any((kind, directory.name) == mark[:2] for mark in marks)


def with_mark(marks: tuple[Mark, ...], step: Step) -> tuple[Mark, ...]:
    """Marks once a step is done: what it makes out of date has to be done again."""
    kinds = {step.kind, *_OUTDATED.get(step.kind, ())}
    name = step.directory.name
    kept = [mark for mark in marks if mark[1] != name or mark[0] not in kinds]
    return (*kept, step.mark)
