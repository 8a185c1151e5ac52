"""The whole way in a minute: make a small FP8 checkpoint, prune it, verify what was written."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from reap_stream.checkpoint.disk import output_errors
from reap_stream.demo_checkpoint import DemoModel, write_checkpoint
from reap_stream.errors import UsageError
from reap_stream.kept_record import KEPT_FILE
from reap_stream.model.opened import open_model
from reap_stream.pipeline import prune
from reap_stream.records import Summary
from reap_stream.resident import gib
from reap_stream.settings import OutputSettings, RunSettings
from reap_stream.verification import VerificationReport
from reap_stream.verifying import verify_directory

SPARSITY: Final = "0.4"
_CALIBRATION: Final = "builtin"
_SAMPLES: Final = 64
_SEQUENCE_LENGTH: Final = 256


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two checkpoints, as the table shows it.

    Attributes:
        experts: routed experts a layer.
        parameters: of the decoder, MTP layer left out.
        shards: files that hold weights.
        nbytes: of all files.
    """

    experts: int
    parameters: int
    shards: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demo did.

    Attributes:
        model: the sizes of the source.
        source: the source.
        pruned: what was written.
        summary: of the pruning run.
        report: of the verification.
        quiet_removed: removed experts that had been made quiet.
        removed: removed experts of all decoder layers.
        seconds: wall time of everything.
    """

    model: DemoModel
    source: Side
    pruned: Side
    summary: Summary
    report: VerificationReport
    quiet_removed: int
    removed: int
    seconds: float

    def table(self) -> str:
        """The summary people see."""
        details = self.summary.details
        unreached = sum(len(experts) for experts in details["unreached_experts"].values())
        sides = [
            ("experts a layer", self.source.experts, self.pruned.experts),
            ("parameters", self.source.parameters, self.pruned.parameters),
            ("shards", self.source.shards, self.pruned.shards),
            ("bytes of all files", self.source.nbytes, self.pruned.nbytes),
        ]
        facts = [
            ("calibration", f"{details['calibration']['tokens']:,} tokens of Python's own text"),
            ("removed", f"{self.removed} experts, {self.quiet_removed} of them made quiet"),
            ("unreached", f"{unreached} experts saw no token"),
            ("verified", f"{self.report.tensors:,} tensors, {self.report.nbytes:,} bytes"),
            ("seconds", f"{self.seconds:.1f}, of which pruning {self.summary.seconds:.1f}"),
            ("peak memory", f"{gib(self.summary.peak_nbytes)}, Python and torch included"),
        ]
        return "\n".join(
            [
                f"{'':20}{'source':>14}{'pruned':>14}",
                *(f"{name:20}{before:>14,}{after:>14,}" for name, before, after in sides),
                "",
                *(f"{name:14}{text}" for name, text in facts),
            ]
        )


def introduction(model: DemoModel) -> str:
    """What is about to happen, and what it does not show."""
    return (
        f"Makes a Glm4MoeForCausalLM checkpoint in FP8: {model.layers} decoder layers, "
        f"{len(model.moe_layers)} of them with {model.experts} experts,\nand a next-token-prediction "
        "layer. Prunes it, and compares every byte with the source.\nThe weights are random: this "
        "shows the machinery and says nothing about quality.\n"
        f"{model.quiet} experts a layer are made quiet (outputs a tenth as long), to be found."
    )


def run_demo(output: Path | None = None, model: DemoModel | None = None) -> DemoResult:
    """Makes a checkpoint, removes 40 % of its experts, compares the result with the source.

    Args:
        output: directory to make, in which `source` and `pruned` stay; None: a temporary one that
            is removed again.
        model: sizes of the checkpoint; None: the default ones.

    Raises:
        UsageError: `output` exists.
        ReapStreamError: something failed on the way.
    """
    model = DemoModel() if model is None else model
    started = time.monotonic()
    with _directory(output) as directory:
        source, pruned = directory / "source", directory / "pruned"
        with output_errors(source):
            write_checkpoint(source, model)
        run = RunSettings(
            model=source,
            calibration=(_CALIBRATION,),
            samples=_SAMPLES,
            sequence_length=_SEQUENCE_LENGTH,
            # So that every machine takes the same way.
            device="cpu",
        )
        shard_nbytes = max(path.stat().st_size for path in source.glob("*.safetensors"))
        settings = OutputSettings(output=pruned, sparsity=SPARSITY, max_shard_nbytes=shard_nbytes)
        summary = prune(run, settings)
        report = verify_directory(pruned, source)
        return _result(model, source, pruned, summary, report, started)


def _result(
    model: DemoModel,
    source: Path,
    pruned: Path,
    summary: Summary,
    report: VerificationReport,
    started: float,
) -> DemoResult:
    architecture = open_model(source).architecture
    removed = quiet_removed = 0
    kept = json.loads((pruned / KEPT_FILE).read_bytes())["kept"]
    for layer in model.moe_layers:
        gone = set(range(model.experts)) - set(kept[str(layer)])
        removed += len(gone)
        quiet_removed += len(gone & set(model.quiet_experts(layer)))
    return DemoResult(
        model=model,
        source=_side(source, model.experts, architecture.total_parameters()),
        pruned=_side(pruned, report.keep, architecture.total_parameters(report.keep)),
        summary=summary,
        report=report,
        quiet_removed=quiet_removed,
        removed=removed,
        seconds=time.monotonic() - started,
    )


def _side(directory: Path, experts: int, parameters: int) -> Side:
    files = [path for path in directory.rglob("*") if path.is_file()]
    shards = sum(path.suffix == ".safetensors" and path.parent == directory for path in files)
    return Side(experts, parameters, shards, sum(path.stat().st_size for path in files))


@contextmanager
def _directory(output: Path | None) -> Iterator[Path]:
    if output is None:
        with tempfile.TemporaryDirectory(prefix="reap-stream-demo-") as name:
            yield Path(name)
        return
    if os.path.lexists(output):
        message = f"{output}: exists already; the demo makes its directory itself"
        raise UsageError(message)
    with output_errors(output):
        output.mkdir(parents=True)
    yield output
