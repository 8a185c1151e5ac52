"""What the batch remembers of each job, so that it can be started again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from reap_stream.batch.jobs_file import Job
from reap_stream.checkpoint.atomic import write_atomically
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.job import stored_settings
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object, shown
from reap_stream.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

# Options that do not decide a byte of the result.
_FREE: Final = frozenset({"memory", "snapshot-minutes"})

Status = Literal["new", "resume", "done"]


@dataclass(frozen=True, slots=True)
class Record:
    """One job as it was begun.

    Attributes:
        settings: those that decide the result, by key.
        scores: scores that it was compacted from; None: it was pruned.
        before: what lay at its output when it was begun, as the system numbers it; None: nothing.
        written: its checkpoints are there.
        steps: what was done with them: ``verify DIR``, ``upload REPO_ID``.
    """

    settings: Mapping[str, Any]
    scores: str | None = None
    before: int | None = None
    written: bool = False
    steps: tuple[str, ...] = field(default=())


def new_record(job: Job, scores: Path | None) -> Record:
    """The record of a job that is about to be run."""
    return Record(_settings(job), None if scores is None else str(scores), _number(job.output))


def _settings(job: Job) -> dict[str, Any]:
    options = {key: list(values) for key, values in job.options.items() if key not in _FREE}
    return {"model": job.model, "output": str(job.output), **options}


def _number(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


class Records:
    """A file for each job in the directory of the batch."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, job: Job) -> Path:
        """Where the job's record is."""
        return self.directory / f"{job.name}.json"

    def read(self, job: Job) -> Record | None:
        """The record of a job; None: it was never begun.

        Raises:
            UsageError: the file is damaged.
        """
        path = self.path(job)
        if not path.exists():
            return None
        try:
            document = parse_object(read_small(path, MAX_JSON_NBYTES), path)
            steps = document.pop("steps")
            return Record(**document, steps=tuple(steps))
        except (CheckpointError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: is no record of a job ({error}); delete it") from error

    def write(self, job: Job, record: Record) -> Record:
        """Keeps a record."""
        raw = (json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n").encode()
        write_atomically(self.path(job), [raw], len(raw))
        return record

    def add_step(self, job: Job, record: Record, step: str) -> Record:
        """Notes down that something was done with the job's checkpoints."""
        return self.write(job, replace(record, steps=(*record.steps, step)))

    def status(self, job: Job) -> Status:
        """How the writing of a job stands.

        Raises:
            UsageError: it was begun with other settings, and is not to be overwritten.
        """
        record = self.read(job)
        if record is None:
            return "new"
        half, there = stored_settings(job.output) is not None, job.output.exists()
        if dict(record.settings) != _settings(job):
            if (half or there) and not job.overwrite:
                raise UsageError(_difference(job, record))
            return "new"
        if half:
            return "resume"
        # Killed between the end of the job and its record: something new lies there.
        finished = record.written or _number(job.output) != record.before
        return "done" if there and finished else "new"


def _difference(job: Job, record: Record) -> str:
    now, before = _settings(job), record.settings
    key = next(key for key in sorted({*now, *before}) if now.get(key) != before.get(key))
    return (
        f"job {job.name!r} was begun with other settings ({key} was {shown(before.get(key))}, is"
        f" {shown(now.get(key))}): give it another output, or overwrite = true"
    )
