"""What became of all jobs: a table for people, a document for machines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from reap_stream.batch.evaluations import Evaluations
from reap_stream.batch.job import Job
from reap_stream.batch.keys import base_name
from reap_stream.batch.outcomes import Board, Outcome
from reap_stream.batch.records import RUN_FILE, Record, Records
from reap_stream.batch.steps import steps_of, was_done
from reap_stream.checkpoint.atomic import write_atomically
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object
from reap_stream.errors import CheckpointError

SUMMARY_FILE: Final = "summary.json"
_FACTS: Final = (
    "seconds",
    "peak_resident_nbytes",
    "peak_device_nbytes",
    "read_nbytes",
    "written_nbytes",
)
_FIGURES: Final = ("loss", "perplexity", "kl", "top1_agreement")
_HEAD: Final = (
    *("job", "model", "method", "keep", "state", "how", "time", "peak memory", "read", "wrote"),
    *("loss", "KL"),
)


class Summary:
    """The summary of a batch.

    Args:
        board: what becomes of the jobs.
        records: what is remembered of them.
        evaluations: what was found of them.
    """

    def __init__(self, board: Board, records: Records, evaluations: Evaluations) -> None:
        self._board = board
        self._records = records
        self._evaluations = evaluations

    def write(self) -> None:
        """Writes the document as of now.

        Raises:
            OutputError: the disk refuses.
        """
        raw = (self.text() + "\n").encode()
        write_atomically(self._records.directory / SUMMARY_FILE, [raw], len(raw))

    def text(self) -> str:
        """The document as text."""
        return json.dumps(self.document(), indent=2, ensure_ascii=False)

    def document(self) -> dict[str, Any]:
        """The summary as JSON values."""
        jobs = [self._entry(outcome) for outcome in self._board]
        return {"format_version": 1, "jobs": jobs, "total": _total(jobs)}

    def table(self) -> str:
        """The summary for people."""
        found = self.document()
        rows = [_HEAD, *(row for entry in found["jobs"] for row in _rows(entry))]
        rows.append(_total_row(found["total"]))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        logs = f"logs: {self._records.directory / 'JOB.log'}"
        return "\n".join([*lines, *_failures(found), logs])

    def _entry(self, outcome: Outcome) -> dict[str, Any]:
        job, record = outcome.job, self._records.read(outcome.job)
        found = self._evaluations.figures(job) if self._is_measured(job, record) else {}
        written = outcome.written or (record is not None and record.written)
        return {
            "name": job.name,
            "model": job.source,
            "method": job.option("method", "reap"),
            "output": str(job.output),
            "state": outcome.state,
            "written": written,
            "step": outcome.step,
            "how": outcome.how,
            "seconds": 0.0 if record is None else round(record.seconds, 3),
            "exit_code": outcome.exit_code,
            "error": outcome.error,
            "log": str(self._records.directory / f"{job.name}.log"),
            "upload": job.upload,
            "source_evaluation": _figures(found.get(None)),
            "checkpoints": [
                {
                    "directory": str(path),
                    "keep": keep,
                    "uploaded": record is not None and was_done("upload", path, record.steps),
                    "evaluation": _figures(found.get(path)),
                }
                for keep, path in zip(job.keeps, job.directories, strict=True)
            ],
            "run": _facts(job) if written else {},
            "status": outcome.said,
        }

    def _is_measured(self, job: Job, record: Record | None) -> bool:
        """Whether figures are of these checkpoints and this text, not of earlier ones."""
        marks = () if record is None else record.steps
        steps = steps_of(job, self._evaluations)
        return all(step.mark in marks for step in steps if step.kind == "eval")


def _figures(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if found is None else {key: found.get(key) for key in _FIGURES}


def _facts(job: Job) -> dict[str, Any]:
    """What the job's own record says it took; all its targets were written together."""
    for checkpoint in job.directories:
        path = checkpoint / RUN_FILE
        with suppress(CheckpointError):
            record = parse_object(read_small(path, MAX_JSON_NBYTES), path)
            return {key: record.get(key) for key in _FACTS}
    return {}


def _total(jobs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    states = [job["state"] for job in jobs]

    def values(key: str) -> list[float]:
        return [job["run"][key] for job in jobs if isinstance(job["run"].get(key), (int, float))]

    return {
        "jobs": len(jobs),
        "states": {state: states.count(state) for state in dict.fromkeys(states)},
        "seconds": round(sum(job["seconds"] for job in jobs), 3),
        "peak_resident_nbytes": max(values("peak_resident_nbytes"), default=None),
        "read_nbytes": sum(values("read_nbytes")),
        "written_nbytes": sum(values("written_nbytes")),
    }


def _rows(entry: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A line for a job, with its first target, and one for each further target."""
    run, targets = entry["run"], entry["checkpoints"]
    first = targets[0] if targets else {}
    yield (
        entry["name"],
        base_name(entry["model"]),
        entry["method"],
        str(first.get("keep", "-")),
        entry["status"],
        entry["how"] or "-",
        f"{entry['seconds']:.1f} s",
        _shown(run.get("peak_resident_nbytes"), 2**30, "GiB"),
        _shown(run.get("read_nbytes"), 1e9, "GB"),
        _shown(run.get("written_nbytes"), 1e9, "GB"),
        *_measured(first.get("evaluation")),
    )
    for target in targets[1:]:
        yield ("", "", "", str(target["keep"]), *[""] * 6, *_measured(target["evaluation"]))


def _total_row(total: Mapping[str, Any]) -> tuple[str, ...]:
    states = ", ".join(f"{count} {state}" for state, count in total["states"].items())
    return (
        f"total: {total['jobs']}",
        *("", "", ""),
        states,
        "",
        f"{total['seconds']:.1f} s",
        _shown(total["peak_resident_nbytes"], 2**30, "GiB"),
        _shown(total["read_nbytes"], 1e9, "GB"),
        _shown(total["written_nbytes"], 1e9, "GB"),
        *("", ""),
    )


def _measured(found: Mapping[str, Any] | None) -> tuple[str, str]:
    loss, kl = ((found or {}).get(key) for key in ("loss", "kl"))
    return ("-" if loss is None else f"{loss:.4f}", "-" if kl is None else f"{kl:.4f}")


def _shown(nbytes: object, unit: float, name: str) -> str:
    return f"{nbytes / unit:.2f} {name}" if isinstance(nbytes, (int, float)) else "-"


def _failures(found: Mapping[str, Any]) -> Iterator[str]:
    for entry in found["jobs"]:
        if entry["state"] == "failed":
            yield f"{entry['name']}: {entry['error']} (log: {entry['log']})"
