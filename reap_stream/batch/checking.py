"""What is checked of every job before the first one starts, in a process of its own.

    python -m reap_stream.batch.checking ANSWERS < QUESTIONS

It needs torch, which the batch itself does not: what it takes is given back when it ends.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_stream.calibration.records import require_pyarrow
from reap_stream.calibration.spec import FILE_SUFFIXES, parse_spec
from reap_stream.cli import build_parser
from reap_stream.commands import output_settings, run_settings
from reap_stream.errors import CalibrationError, ReapStreamError, UsageError
from reap_stream.finishing import check_job
from reap_stream.hub.names import parse_hub_name
from reap_stream.planning import PruningPlan, plan_pruning
from reap_stream.resident import gib
from reap_stream.settings import OutputSettings, RunSettings
from reap_stream.sources import local_sources


@dataclass(frozen=True, slots=True)
class Planned:
    """What is known of a job that can be run.

    Attributes:
        keeps: kept experts of each target.
        disk_nbytes: free space that it needs.
    """

    keeps: tuple[int, ...]
    disk_nbytes: int


def check(line: Sequence[str], *, new: bool) -> Planned:
    """Checks a job as far as it can be without reading a weight.

    Args:
        line: its `prune` command.
        new: its output must not be there yet, unless the command overwrites it.

    Raises:
        ReapStreamError: see its children; the job would be refused.
    """
    arguments = _parsed(line)
    if parse_hub_name(str(arguments.model)) is not None:
        # Planning fetches no shard that could be deleted.
        arguments.evict = False
    with local_sources("plan", arguments):
        run, output = run_settings(arguments), output_settings(arguments)
        if new:
            check_job(output.output, run.model, output)
        for spec in run.calibration:
            check_spec(spec)
        planned = plan_pruning(run, output)
    _check_plan(planned, run, output)
    keeps = tuple(variant.keep for variant in planned.variants)
    return Planned(keeps, planned.disk_bytes)


def _parsed(line: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, whose refusal is an error as any other."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return build_parser().parse_args(line)
    except SystemExit as error:
        raise UsageError(said.getvalue().strip().rpartition("error: ")[2]) from error


def check_spec(text: str) -> None:
    """Refuses a SPEC whose file is not there or cannot be read.

    Raises:
        UsageError: it is no SPEC, or a file of another kind.
        CalibrationError: there is no such file, or nothing that reads it.
    """
    spec = parse_spec(text)
    if spec.kind != "file":
        return
    if not spec.path.is_file():
        raise CalibrationError(f"SPEC {text!r}: there is no file {spec.path}")
    if spec.path.suffix not in FILE_SUFFIXES:
        raise UsageError(f"SPEC {text!r}: no {', '.join(FILE_SUFFIXES)} file")
    if spec.path.suffix == ".parquet":
        require_pyarrow(spec.path)


def _check_plan(planned: PruningPlan, run: RunSettings, output: OutputSettings) -> None:
    """Refuses what the plan only warns of."""
    if run.propagate == "pruned" and len(planned.variants) > 1:
        raise UsageError('propagate = "pruned" needs a job for each target')
    if not planned.calibration.fits:
        least = max(variant.peak_host_bytes for variant in planned.variants)
        budget = planned.calibration.memory_budget_bytes
        raise UsageError(
            f"{output.output}: memory for the pass is {gib(budget)}, at least {gib(least)} are"
            " needed: give more"
        )


def answer(question: Any) -> dict[str, Any]:
    """What is planned, or why it cannot be.

    Args:
        question: ``line`` and ``new`` as `check` has them.
    """
    try:
        planned = check(question["line"], new=question["new"])
    except ReapStreamError as error:
        return {"error": str(error)}
    return {"keeps": planned.keeps, "disk_nbytes": planned.disk_nbytes}


if __name__ == "__main__":
    answers = [answer(question) for question in json.load(sys.stdin)]
    Path(sys.argv[1]).write_text(json.dumps(answers), encoding="utf-8")
