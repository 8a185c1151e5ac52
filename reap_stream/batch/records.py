"""What the batch remembers of each job, so that it can be started again."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from reap_stream.batch.job import Job
from reap_stream.batch.steps import Mark
from reap_stream.checkpoint.atomic import write_atomically
from reap_stream.checkpoint.disk import output_errors
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.job import stored_settings
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object, shown
from reap_stream.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RUN_FILE: Final = "reap/run.json"
# Options that do not decide a byte of the result.
_FREE: Final = frozenset({"memory", "snapshot-minutes"})
# Options that run.json has as they were given, and what it has without them.
_RECORDED: Final = {"method": "reap", "seed": "0", "keep": "", "sparsity": "", "weights": "keep"}

Status = Literal["new", "resume", "done"]


@dataclass(frozen=True, slots=True)
class Record:
    """One job as it was begun.

    Attributes:
        settings: those that decide the result, by key.
        commit: id and commit of a model on the Hub; empty for a directory.
        keeps: kept experts of each target.
        scores: scores that it was compacted from; None: it was pruned.
        before: what lay at its output when it was begun, as the system numbers it; None: nothing.
        failed: the command that writes has ended, and not well.
        report: pages of reports that are its own; None: it has none.
        written: its checkpoints are there.
        seconds: wall time of its commands, in all starts.
        steps: what was done with them.
    """

    settings: Mapping[str, Any]
    commit: str = ""
    keeps: tuple[int, ...] = ()
    scores: str | None = None
    before: int | None = None
    failed: bool = False
    report: str | None = None
    written: bool = False
    seconds: float = 0.0
    steps: tuple[Mark, ...] = ()


def new_record(job: Job, scores: Path | None) -> Record:
    """The record of a job that is about to be run."""
    return Record(
        _settings(job),
        job.commit,
        job.keeps,
        None if scores is None else str(scores),
        _number(job.output),
        report=None if job.report is None else str(job.report),
    )


def _settings(job: Job) -> dict[str, Any]:
    options = {key: list(values) for key, values in job.options.items() if key not in _FREE}
    return {"model": job.model, "output": str(job.output), **options}


def _number(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


class Records:
    """A file for each job in a directory of the batch.

    Args:
        directory: the batch's own; records are in a folder of it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, job: Job) -> Path:
        """Where the job's record is: told by its output, as its name may change."""
        folder = self.directory / "records"
        return next(folder.glob(f"*-{job.number}.json"), folder / f"{job.name}-{job.number}.json")

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
            document["keeps"] = tuple(map(int, document["keeps"]))
            document["steps"] = tuple(
                (kind, name, with_) for kind, name, with_ in document["steps"]
            )
            return Record(**document)
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}: is no record of a job ({error}); delete it") from error

    def write(self, job: Job, record: Record) -> Record:
        """Keeps a record.

        Raises:
            OutputError: the disk refuses.
        """
        path = self.path(job)
        raw = (json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n").encode()
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, [raw], len(raw))
        return record

    def change(self, job: Job, **changes: Any) -> Record:
        """Keeps a record with some of it changed."""
        record = self.read(job) or new_record(job, None)
        return self.write(job, replace(record, **changes))

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
        if record.written:
            return self._status_of_written(job, record)
        # Killed between the end of the job and its record: what it wrote lies there.
        may_be = there and not record.failed and _number(job.output) != record.before
        return "done" if may_be and _are_results(job, record) else "new"

    def _status_of_written(self, job: Job, record: Record) -> Status:
        """What was uploaded may be deleted to make room; else it is written again as a whole."""
        job = replace(job, keeps=record.keeps)
        uploaded = {name for kind, name, _ in record.steps if kind == "upload"}
        there = [path for path in job.directories if path.exists()]
        gone = [path for path in job.directories if path not in there and path.name not in uploaded]
        others = [path for path in there if not _is_result(job, record, path)]
        if not gone and not others:
            return "done"
        if job.output.exists() and not job.overwrite:
            what = f"{gone[0]} was written and is gone" if gone else f"{others[0]} is another's now"
            raise UsageError(
                f"job {job.name!r}: {what}: put back what was there, or give overwrite = true to"
                " write all targets again"
            )
        return "new"


def _are_results(job: Job, record: Record) -> bool:
    """Whether a job like this one wrote what lies at its output."""
    job = replace(job, keeps=record.keeps)
    return all(_is_result(job, record, directory) for directory in job.directories)


def _is_result(job: Job, record: Record, directory: Path) -> bool:
    path = directory / RUN_FILE
    with suppress(CheckpointError, KeyError, TypeError):
        run = parse_object(read_small(path, MAX_JSON_NBYTES), path)
        settings, source = run["settings"], run["source"]
        same_options = all(
            job.option(key, default) == str(settings.get(key) or default)
            for key, default in _RECORDED.items()
        )
        same_texts = _names(job.options["calibration"]) == _names(run["calibration"]["sources"])
        origin = f"{source.get('repository')}@{source.get('revision')}"
        # Records that may be published have no paths but the last part.
        same_source = origin == record.commit or Path(source["path"]).name == Path(job.model).name
        return same_options and same_texts and same_source
    return False


def _names(texts: Sequence[str]) -> list[str]:
    return [Path(text).name for text in texts]


def _difference(job: Job, record: Record) -> str:
    now, before = _settings(job), record.settings
    key = next(key for key in sorted({*now, *before}) if now.get(key) != before.get(key))
    return (
        f"job {job.name!r} was begun with other settings ({key} was {shown(before.get(key))}, is"
        f" {shown(now.get(key))}): give it another output, or overwrite = true"
    )
