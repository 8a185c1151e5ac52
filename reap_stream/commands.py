"""What each command does with its parsed arguments; heavy modules are imported here."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reap_stream.calibration.schemas import parse_field_map
from reap_stream.card.command import card
from reap_stream.checkpoint.providers import model_name
from reap_stream.compaction import compact as run_compact
from reap_stream.demo.data import training_record
from reap_stream.demo.result import introduction
from reap_stream.demo.running import EVALUATION, PRUNED, run_demo
from reap_stream.errors import UsageError
from reap_stream.evaluation.command import evaluate
from reap_stream.inspection import inspect_model
from reap_stream.pipeline import observe as run_observe
from reap_stream.pipeline import prune as run_prune
from reap_stream.planning import plan_pruning
from reap_stream.ranks.base import ALONE, Ranks
from reap_stream.records import Summary
from reap_stream.resident import gib, peak_resident_nbytes
from reap_stream.scoring.merging import merge_scores
from reap_stream.scoring.scores_file import check_scores_file, load_scores, save_scores
from reap_stream.scoring.weights import parse_source_weights
from reap_stream.settings import ChoiceSettings, OutputSettings, RunSettings, parse_nbytes
from reap_stream.tables import inspection_text, plan_text
from reap_stream.upload.checksums import record_checksums
from reap_stream.upload.command import upload
from reap_stream.verification import VerificationReport
from reap_stream.verifying import verify_directory

__all__ = [
    "card",
    "compact",
    "demo",
    "evaluate",
    "inspect",
    "merge",
    "observe",
    "plan",
    "prune",
    "upload",
    "verify",
]


def run_settings(arguments: argparse.Namespace) -> RunSettings:
    """The settings of a command that runs the model."""
    return RunSettings(
        model=arguments.model,
        calibration=tuple(arguments.calibration),
        method=getattr(arguments, "method", "reap"),
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        batch_tokens=arguments.batch_tokens,
        seed=arguments.seed,
        device=arguments.device,
        compute_dtype=arguments.compute_dtype,
        memory=None if arguments.memory is None else parse_nbytes(arguments.memory),
        propagate=getattr(arguments, "propagate", "original"),
        source_weights=parse_source_weights(
            getattr(arguments, "source_weights", None), arguments.calibration
        ),
        protect=getattr(arguments, "protect", "none"),
        trust_remote_code=arguments.trust_remote_code,
        pack=getattr(arguments, "pack", False),
        field_map=parse_field_map(getattr(arguments, "map", ())),
        progress=_ranks(arguments).leads,
    )


def _ranks(arguments: argparse.Namespace) -> Ranks:
    ranks: Ranks = getattr(arguments, "ranks", ALONE)
    return ranks


def output_settings(arguments: argparse.Namespace) -> OutputSettings:
    """The settings of a command that writes a checkpoint."""
    return OutputSettings(
        output=arguments.output,
        sparsity=arguments.sparsity,
        keep=arguments.keep,
        weights=arguments.weights,
        fp8_experts_only=arguments.fp8_experts_only,
        max_shard_nbytes=parse_nbytes(arguments.max_shard_size),
        mtp=arguments.mtp,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        snapshot_seconds=60.0 * arguments.snapshot_minutes,
    )


def choice_settings(arguments: argparse.Namespace, method: str) -> ChoiceSettings:
    """How a command that is given scores chooses by them."""
    text = arguments.source_weights
    sources = () if text is None else load_scores(arguments.scores).sources
    weights = parse_source_weights(text, sources)
    return ChoiceSettings(method, arguments.seed, weights, arguments.protect)


def inspect(arguments: argparse.Namespace) -> None:
    """`reap-stream inspect`."""
    inspection = inspect_model(arguments.model, trust_remote_code=arguments.trust_remote_code)
    _say(_json(inspection.document()) if arguments.json else inspection_text(inspection))


def plan(arguments: argparse.Namespace) -> None:
    """`reap-stream plan`."""
    # A plan counts the tokens of the calibration data but does not open it.
    arguments.calibration, arguments.source_weights = ("builtin",), None
    output = OutputSettings(
        output=Path(),
        sparsity=arguments.sparsity,
        keep=arguments.keep,
        weights=arguments.weights,
        fp8_experts_only=arguments.fp8_experts_only,
        max_shard_nbytes=parse_nbytes(arguments.max_shard_size),
        mtp=arguments.mtp,
    )
    planned = plan_pruning(run_settings(arguments), output)
    _say(_json(planned.document()) if arguments.json else plan_text(planned))


def prune(arguments: argparse.Namespace) -> None:
    """`reap-stream prune`."""
    ranks = _ranks(arguments)
    summary = run_prune(run_settings(arguments), output_settings(arguments), ranks)
    if ranks.leads:
        _report(summary, arguments.output)


def observe(arguments: argparse.Namespace) -> None:
    """`reap-stream observe`."""
    summary = run_observe(
        run_settings(arguments),
        arguments.output,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        snapshot_seconds=60.0 * arguments.snapshot_minutes,
        ranks=_ranks(arguments),
    )
    if _ranks(arguments).leads:
        _report(summary, arguments.output)


def compact(arguments: argparse.Namespace) -> None:
    """`reap-stream compact`."""
    summary = run_compact(
        arguments.model,
        arguments.scores,
        choice_settings(arguments, arguments.method),
        output_settings(arguments),
        other_weights=arguments.scores_of_other_weights,
        trust_remote_code=arguments.trust_remote_code,
    )
    _report(summary, arguments.output)


def merge(arguments: argparse.Namespace) -> None:
    """`reap-stream merge`."""
    if arguments.output.exists() and not arguments.overwrite:
        message = f"{arguments.output}: exists already; --overwrite to replace it"
        raise UsageError(message)
    check_scores_file(arguments.output)
    merged = merge_scores([load_scores(path) for path in arguments.scores])
    save_scores(arguments.output, merged)
    _say(f"{arguments.output}: {len(merged.layers)} layers, sources {', '.join(merged.sources)}")


def verify(arguments: argparse.Namespace) -> None:
    """`reap-stream verify`."""
    started = time.monotonic()
    report = verify_directory(
        arguments.directory, arguments.source, trust_remote_code=arguments.trust_remote_code
    )
    _say(
        f"{arguments.directory}: {report.tensors} tensors, {report.nbytes} bytes identical to "
        f"{model_name(arguments.source)}{_computed(report)}; {report.keep} experts in each of {_layers(report)}; "
        f"{time.monotonic() - started:.1f} s · peak memory {gib(peak_resident_nbytes())} · "
        f"read {2 * report.nbytes / 1e9:.2f} GB"
    )
    if arguments.checksums:
        _say(f"{record_checksums(arguments.directory)}: hashes of all files")


def _computed(report: VerificationReport) -> str:
    if not report.computed:
        return ""
    return f" ({report.computed} tensors to what was computed from it anew)"


def _layers(report: VerificationReport) -> str:
    decoder = f"{report.layers - report.mtp_layers} decoder layers"
    if not report.mtp_layers:
        return decoder
    return f"{decoder} and {report.mtp_layers} next-token-prediction layers"


def demo(arguments: argparse.Namespace) -> None:
    """`reap-stream demo`."""
    _say(f"{introduction(training_record())}\n")
    _say(run_demo(arguments.output).table())
    if arguments.output is None:
        _say("kept          nothing; with --output DIR the pruned checkpoints stay")
    else:
        _say(f"kept          {arguments.output / PRUNED}, {arguments.output / EVALUATION}")


def _report(summary: Summary, output: Path) -> None:
    for note in summary.notes():
        print(f"note: {note}", file=sys.stderr)  # noqa: T201 - this is the command line
    _say(f"{_written(summary, output)}: {summary.line()}")


def _written(summary: Summary, output: Path) -> str:
    """The directories of all targets; the output itself where it has one or none."""
    keeps = summary.details.get("serving", {})
    if len(keeps) < 2:
        return str(output)
    return ", ".join(str(output / f"keep-{keep}") for keep in keeps)


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False)


def _say(text: str) -> None:
    print(text)  # noqa: T201 - this is the command line
