"""What is checked of every job before the first one starts, in a process of its own.

    python -m reap_stream.batch.checking ANSWERS < QUESTIONS

It needs torch, which the batch itself does not: what it takes is given back when it ends.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reap_stream.batch.checking_steps import StepChecks
from reap_stream.checkpoint.providers import provider_of
from reap_stream.cli import build_parser
from reap_stream.commands import output_settings, run_settings
from reap_stream.errors import ReapStreamError, UsageError
from reap_stream.evaluation.command import eval_settings
from reap_stream.finishing import check_job
from reap_stream.hub.names import parse_hub_name
from reap_stream.hub.work_directory import check_work_directory
from reap_stream.planning import PruningPlan, plan_pruning
from reap_stream.preparation import choose_device
from reap_stream.resident import gib
from reap_stream.settings import OutputSettings, RunSettings
from reap_stream.sources import local_sources, work_directory


@dataclass(frozen=True, slots=True)
class Planned:
    """What is known of a job that can be run.

    Attributes:
        keeps: kept experts of each target.
        disk_nbytes: free space for its checkpoints.
        passing_nbytes: free space beside them while it runs.
        download_nbytes: free space in the Hub's cache.
        cache: where that is.
        commit: id and commit of a model on the Hub; empty for a directory.
    """

    keeps: tuple[int, ...]
    disk_nbytes: int
    passing_nbytes: int
    download_nbytes: int = 0
    cache: str = ""
    commit: str = ""


def check(line: Sequence[str], steps: StepChecks, *, new: bool) -> Planned:
    """Checks a job as far as it can be without reading a weight.

    Args:
        line: its `prune` command.
        steps: checks its texts.
        new: its output must not be there yet, unless the command overwrites it.

    Raises:
        ReapStreamError: see its children; the job would be refused.
    """
    arguments = _parsed(line)
    evict = arguments.evict
    if parse_hub_name(str(arguments.model)) is not None and evict:
        check_work_directory(work_directory(arguments.output))
        # Planning fetches no shard that could be deleted.
        arguments.evict = False
    with local_sources("plan", arguments):
        run, output = run_settings(arguments), output_settings(arguments)
        if new:
            check_job(output.output, run.model, output)
        for spec in run.calibration:
            steps.check_spec(spec, "calibration")
        provider = provider_of(run.model)
        planned = plan_pruning(run, output)
        commit = "" if provider is None else str(provider.origin)
    _check_plan(planned, run, output)
    outputs = sum(variant.bytes for variant in planned.variants)
    passing, download = max(0, planned.disk_bytes - outputs), planned.download
    keeps = tuple(variant.keep for variant in planned.variants)
    if download is None:
        return Planned(keeps, outputs, passing)
    if evict:
        return Planned(keeps, outputs, passing + download.evicted_peak_bytes, commit=commit)
    return Planned(keeps, outputs, passing, download.bytes, str(run.model), commit)


def _parsed(line: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, whose refusal is an error as any other."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return build_parser().parse_args(line)
    except SystemExit as error:
        raise UsageError(said.getvalue().strip().rpartition("error: ")[2]) from error


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


def answer(question: Mapping[str, Any], steps: StepChecks) -> dict[str, Any]:
    """What is planned, or why it cannot be.

    Args:
        question: as `reap_stream.batch.asking` puts it.
        steps: checks of texts and of what follows the writing.
    """
    try:
        found: dict[str, Any] = {"keeps": question["keeps"]}
        if question["line"]:
            found = asdict(check(question["line"], steps, new=question["new"]))
        if question["eval"]:
            settings = eval_settings(_parsed(question["eval"]))
            choose_device(settings.device)
            for text in settings.text:
                steps.check_spec(text, "eval")
        notes = steps.check(question, found["keeps"])
    except ReapStreamError as error:
        return {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - one job's defect must not hide those of others
        return {"error": f"{type(error).__name__}: {error}"}
    return {**found, "notes": notes}


def answer_all(questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The answers, in the order of the questions."""
    steps = StepChecks()
    return [answer(question, steps) for question in questions]


if __name__ == "__main__":
    answers = answer_all(json.load(sys.stdin))
    Path(sys.argv[1]).write_text(json.dumps(answers), encoding="utf-8")
