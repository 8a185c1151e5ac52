"""Files of jobs, and a batch whose commands run in this process: fifty starts of torch take minutes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from reap_stream.batch import asking, checking, process
from reap_stream.cli import main

DEFAULTS: dict[str, Any] = {
    "compute-dtype": "float32",
    "device": "cpu",
    "batch-tokens": 72,
    "max-shard-size": "40kB",
    "keep": 4,
}

# What is asked of a job that nothing follows, but for its line.
QUESTION = {
    "new": True,
    "keeps": [],
    "overwrite": False,
    "own_report": False,
    "text": [],
    "calibration": [],
    "eval": None,
    "report": None,
    "upload": None,
    "base_model": None,
}


def toml(value: Any) -> str:
    """A value as TOML writes it; JSON's forms are among TOML's for these."""
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(key)} = {toml(part)}" for key, part in value.items())
        return f"{{{inner}}}"
    return json.dumps(value)


def write_jobs(path: Path, defaults: dict[str, Any], *jobs: dict[str, Any]) -> Path:
    """Writes a file of jobs."""
    lines = ["[defaults]", *(f"{key} = {toml(value)}" for key, value in defaults.items())]
    for job in jobs:
        lines += ["", "[[job]]", *(f"{key} = {toml(value)}" for key, value in job.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run_batch(path: Path, *options: str, code: int = 0) -> list[dict[str, Any]]:
    """Runs a batch; the jobs of its summary."""
    assert main(["batch", str(path), *options]) == code
    summary = path.parent / f"{path.stem}.reap-batch" / "summary.json"
    jobs: list[dict[str, Any]] = json.loads(summary.read_text(encoding="utf-8"))["jobs"]
    return jobs


def states(jobs: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """What became of each job, and by which command."""
    return [(job["name"], job["state"], job["how"]) for job in jobs]


def stay_in_process(monkeypatch: Any) -> None:
    """Has a batch run its commands, and its checks, without a process for each."""

    def run_line(line: list[str], base: Path, log: Path) -> int:
        with (
            log.open("a", encoding="utf-8") as stream,
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
            monkeypatch.context() as patch,
        ):
            patch.chdir(base)
            stream.write(f"$ reap-stream {' '.join(line)}\n")
            return main(line)

    def ask(questions: list[Any], base: Path) -> Any:
        with monkeypatch.context() as patch:
            patch.chdir(base)
            return json.loads(json.dumps(checking.answer_all(json.loads(json.dumps(questions)))))

    monkeypatch.setattr(process, "run_line", run_line)
    monkeypatch.setattr(asking, "ask", ask)


def record_of(path: Path, name: str) -> Path:
    """Where a batch keeps what it remembers of a job."""
    (found,) = (path.parent / f"{path.stem}.reap-batch" / "records").glob(f"{name}-*.json")
    return found
