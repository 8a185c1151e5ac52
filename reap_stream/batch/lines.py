"""The command lines of a job, without the program's name.

Jobs that differ in what is chosen and written alone share one reading of their model: the first of
them prunes, which leaves the scores beside its checkpoint, and the others are compacted from these.
The bytes are the same as if each had been pruned. What is evaluated on the same text is evaluated in
one reading of the model as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from reap_stream.batch.job import Job, as_options
from reap_stream.batch.keys import PASS, WRITING

# Beside the pass itself: they decide which rows are drawn, and which layers are scored.
_OF_SCORES: Final = (*PASS, "seed", "mtp", "trust-remote-code")
SCORES_FILE: Final = "reap/scores.safetensors"


def sharing_key(job: Job) -> tuple[object, ...] | None:
    """What jobs have in common whose scores are the same; None: this job's are its own.

    Scores of ``propagate = "pruned"`` depend on the target. With ``evict`` the source is deleted
    behind the pass: `compact` fetches it again, and does not run it.
    """
    if job.option("propagate") == "pruned":
        return None
    return (job.source, tuple((key, job.options.get(key, ())) for key in _OF_SCORES))


def evaluation_key(job: Job) -> tuple[object, ...] | None:
    """What jobs have in common that are evaluated in one reading; None: it is not evaluated."""
    if not job.evaluation:
        return None
    return (job.source, *as_options(job.evaluation), *_trust(job))


def companions(job: Job, jobs: Sequence[Job]) -> list[Job]:
    """Those that are evaluated together with a job, itself among them."""
    key = evaluation_key(job)
    return [job] if key is None else [other for other in jobs if evaluation_key(other) == key]


def scores_of(job: Job) -> Path | None:
    """The scores that a finished job has left; None: there are none."""
    files = (directory / SCORES_FILE for directory in job.directories)
    return next((path for path in files if path.is_file()), None)


def writing_line(job: Job, scores: Path | None = None, *, resume: bool = False) -> list[str]:
    """`prune`, or `compact` where there are scores.

    Args:
        job: the job.
        scores: scores of a job that shares its reading.
        resume: go on with it.
    """
    if scores is None:
        line = ["prune", job.source, "--output", str(job.output)]
        line += as_options(job.options, (*PASS, *WRITING))
    else:
        line = ["compact", job.source, "--scores", str(scores), "--output", str(job.output)]
        line += as_options(job.options, tuple(WRITING))
    if resume:
        return [*line, "--resume"]
    return [*line, "--overwrite"] if job.overwrite else line


def verify_line(job: Job, directory: Path) -> list[str]:
    """`verify` of one checkpoint."""
    evict = ["--evict"] if job.options.get("evict") else []
    return ["verify", str(directory), "--source", job.source, *evict, *_trust(job)]


def eval_line(jobs: Sequence[Job], output: Path) -> list[str]:
    """`eval` of all checkpoints of jobs that are evaluated together."""
    first = jobs[0]
    directories = [str(directory) for job in jobs for directory in job.directories]
    line = ["eval", first.source, *directories, "--output", str(output), "--overwrite"]
    return [*line, *as_options(first.evaluation), *_trust(first)]


def report_line(directory: Path, page: Path, evaluation: Path | None) -> list[str]:
    """`report` of one checkpoint; what it replaces was looked at before the batch began."""
    more = [] if evaluation is None else ["--eval", str(evaluation)]
    return ["report", str(directory), "--output", str(page), "--overwrite", *more]


def card_line(job: Job, directory: Path, evaluation: Path | None) -> list[str]:
    """`card` of one checkpoint."""
    line = ["card", str(directory)]
    line += [] if evaluation is None else ["--eval", str(evaluation)]
    return line if job.base_model is None else [*line, "--base-model", job.base_model]


def upload_line(job: Job, directory: Path, repository: str) -> list[str]:
    """`upload` of one checkpoint."""
    return ["upload", str(directory), repository, *as_options(job.upload_options)]


def _trust(job: Job) -> list[str]:
    return ["--trust-remote-code"] if job.options.get("trust-remote-code") else []
