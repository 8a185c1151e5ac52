"""What became of all jobs: a table for people, a document for machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from reap_stream.batch.keys import base_name
from reap_stream.batch.running import Outcome
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object
from reap_stream.errors import CheckpointError

RUN_FILE: Final = "reap/run.json"
_FACTS: Final = (
    "seconds",
    "peak_resident_nbytes",
    "peak_device_nbytes",
    "read_nbytes",
    "written_nbytes",
)


def document(outcomes: Sequence[Outcome], directory: Path, seconds: float) -> dict[str, Any]:
    """The summary as JSON values.

    Args:
        outcomes: of all jobs.
        directory: where the logs are.
        seconds: wall time of this start.
    """
    return {
        "format_version": 1,
        "seconds": round(seconds, 3),
        "jobs": [_entry(outcome, directory) for outcome in outcomes],
    }


def _entry(outcome: Outcome, directory: Path) -> dict[str, Any]:
    job, written = outcome.job, outcome.state in ("done", "skipped")
    checkpoints = job.directories() if written else []
    return {
        "name": job.name,
        "model": job.model,
        "method": job.option("method", "reap"),
        "output": str(job.output),
        "state": outcome.state,
        "how": outcome.how,
        "seconds": round(outcome.seconds, 3),
        "exit_code": outcome.exit_code,
        "error": outcome.error,
        "log": str(directory / f"{job.name}.log"),
        "upload": job.upload,
        "checkpoints": [str(path) for path in checkpoints],
        "run": _facts(checkpoints),
    }


def _facts(checkpoints: Sequence[Path]) -> dict[str, Any]:
    """What the job's own record says it took."""
    for checkpoint in checkpoints[:1]:
        path = checkpoint / RUN_FILE
        with suppress(CheckpointError):
            record = parse_object(read_small(path, MAX_JSON_NBYTES), path)
            return {key: record.get(key) for key in _FACTS}
    return {}


def table(found: dict[str, Any]) -> str:
    """The summary for people, from its document."""
    head = ("job", "model", "method", "state", "how", "time", "peak memory", "read", "wrote")
    rows: list[tuple[str, ...]] = [head, *map(_row, found["jobs"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *_failures(found)])


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    run = entry["run"] if entry["state"] == "done" else {}
    return (
        entry["name"],
        base_name(entry["model"]),
        entry["method"],
        entry["state"],
        entry["how"] or "-",
        f"{entry['seconds']:.1f} s",
        _shown(run.get("peak_resident_nbytes"), 2**30, "GiB"),
        _shown(run.get("read_nbytes"), 1e9, "GB"),
        _shown(run.get("written_nbytes"), 1e9, "GB"),
    )


def _shown(nbytes: object, unit: float, name: str) -> str:
    return f"{nbytes / unit:.2f} {name}" if isinstance(nbytes, (int, float)) else "-"


def _failures(found: dict[str, Any]) -> Iterator[str]:
    for entry in found["jobs"]:
        if entry["state"] == "failed":
            yield f"{entry['name']}: {entry['error']} (log: {entry['log']})"
