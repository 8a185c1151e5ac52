"""What one reading found of many checkpoints, divided: a file for each job, and for each checkpoint.

evaluations/
    NAME-NUMBER/all.json       the source and all targets of a job, for its report and the summary
    NAME-NUMBER/DIRECTORY.json the source and one checkpoint, for its card
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from reap_stream.batch.job import Job
from reap_stream.batch.keys import base_name
from reap_stream.checkpoint.atomic import write_atomically
from reap_stream.checkpoint.disk import output_errors
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object
from reap_stream.errors import CheckpointError, OutputError


class Evaluations:
    """The evaluations of a batch.

    Args:
        directory: where they lie.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def scratch(self) -> Path:
        """Where what one reading finds is written until it is divided."""
        return self._directory / "reading.json"

    def begin(self) -> None:
        """Makes room for a reading.

        Raises:
            OutputError: there is none.
        """
        with output_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            self.scratch.unlink(missing_ok=True)

    def of_job(self, job: Job) -> Path:
        """The file of a job."""
        return self._of(job) / "all.json"

    def of_checkpoint(self, job: Job, directory: Path) -> Path:
        """The file of one checkpoint."""
        return self._of(job) / f"{directory.name}.json"

    def _of(self, job: Job) -> Path:
        found = self._directory.glob(f"*-{job.number}")
        return next(found, self._directory / f"{job.name}-{job.number}")

    def divide(self, jobs: Sequence[Job]) -> None:
        """Divides what was found of jobs that were evaluated together.

        Raises:
            OutputError: a file could not be written, or lacks a checkpoint.
            CheckpointError: what was found cannot be read.
        """
        found = parse_object(read_small(self.scratch, MAX_JSON_NBYTES), self.scratch)
        reference, *others = found["candidates"]
        by_path = {candidate["model"]: candidate for candidate in others}
        for job in jobs:
            source = {**reference, "label": base_name(job.model)}
            missing = [path for path in job.directories if str(path) not in by_path]
            if missing:
                raise OutputError(f"{self.scratch}: nothing was found of {missing[0]}")
            own = [{**by_path[str(path)], "label": _label(job, path)} for path in job.directories]
            with output_errors(self._directory):
                self.of_job(job).parent.mkdir(exist_ok=True)
            for path, candidate in zip(job.directories, own, strict=True):
                pair = {**found, "candidates": [source, candidate]}
                _write(self.of_checkpoint(job, path), pair)
            _write(self.of_job(job), {**found, "candidates": [source, *own]})
        with output_errors(self.scratch):
            self.scratch.unlink()

    def figures(self, job: Job) -> dict[Path | None, Mapping[str, Any]]:
        """Figures over all text, by checkpoint; of the source by None. Empty: it is not evaluated."""
        path = self.of_job(job)
        if job.evaluation and path.is_file():
            with suppress(CheckpointError, KeyError, TypeError):
                found = parse_object(read_small(path, MAX_JSON_NBYTES), path)
                reference, *others = found["candidates"]
                known = {candidate["label"]: candidate["all"] for candidate in others}
                figures: dict[Path | None, Mapping[str, Any]] = {None: reference["all"]}
                for directory in job.directories:
                    if _label(job, directory) in known:
                        figures[directory] = known[_label(job, directory)]
                return figures
        return {}


def _label(job: Job, directory: Path) -> str:
    return f"{job.output.name}-{directory.name}" if job.has_targets else directory.name


def _write(path: Path, document: Mapping[str, Any]) -> None:
    raw = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    write_atomically(path, [raw], len(raw))
