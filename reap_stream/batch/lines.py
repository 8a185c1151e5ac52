"""The command lines of a job, without the program's name.

Jobs that differ in what is chosen and written alone share one reading of their model: the first of
them prunes, which leaves the scores beside its checkpoint, and the others are compacted from these.
The bytes are the same as if each had been pruned.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from reap_stream.batch.jobs_file import Job
from reap_stream.batch.keys import PASS, WRITING

# Beside the pass itself: they decide which rows are drawn, and which layers are scored.
_OF_SCORES: Final = (*PASS, "seed", "mtp", "trust-remote-code")
SCORES_FILE: Final = "reap/scores.safetensors"


def sharing_key(job: Job) -> tuple[object, ...] | None:
    """What jobs have in common whose scores are the same; None: this job's are its own.

    Scores of ``propagate = "pruned"`` depend on the target. With ``evict`` the source is deleted
    behind the pass, and `compact` would fetch it whole.
    """
    if job.option("propagate") == "pruned" or job.options.get("evict"):
        return None
    return (job.model, tuple((key, job.options.get(key, ())) for key in _OF_SCORES))


def scores_of(job: Job) -> Path | None:
    """The scores that a finished job has left; None: there are none."""
    files = (directory / SCORES_FILE for directory in job.directories())
    return next((path for path in files if path.is_file()), None)


def writing_line(job: Job, scores: Path | None = None, *, resume: bool = False) -> list[str]:
    """`prune`, or `compact` where there are scores.

    Args:
        job: the job.
        scores: scores of a job that shares its reading.
        resume: go on with it.
    """
    if scores is None:
        line = ["prune", job.model, "--output", str(job.output), *_options(job, (*PASS, *WRITING))]
    else:
        line = ["compact", job.model, "--scores", str(scores), "--output", str(job.output)]
        line += _options(job, tuple(WRITING))
    if resume:
        return [*line, "--resume"]
    return [*line, "--overwrite"] if job.overwrite else line


def _options(job: Job, keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        for value in job.options.get(key, ()):
            yield f"--{key}={value}" if value else f"--{key}"


def verify_line(job: Job, directory: Path) -> list[str]:
    """`verify` of one checkpoint."""
    trust = ["--trust-remote-code"] if job.options.get("trust-remote-code") else []
    return ["verify", str(directory), "--source", job.model, *trust]


def upload_line(job: Job, directory: Path) -> list[str]:
    """`upload` of one checkpoint."""
    assert job.upload is not None
    repository = job.upload.replace("{keep}", directory.name.removeprefix("keep-"))
    return ["upload", str(directory), repository, *(["--public"] if job.public else [])]
