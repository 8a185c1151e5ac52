"""The whole way in a minute: score, prune to three sizes, verify, evaluate."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from reap_stream.checkpoint.disk import output_errors
from reap_stream.demo.data import HELD_OUT, MODEL
from reap_stream.demo.result import DemoResult, Row
from reap_stream.errors import UsageError
from reap_stream.evaluating import evaluate
from reap_stream.model.architecture import Architecture
from reap_stream.model.opened import open_model
from reap_stream.pipeline import prune
from reap_stream.pruning import SCORES_FILE
from reap_stream.resident import peak_resident_nbytes
from reap_stream.scoring.selection import kept_count
from reap_stream.settings import (
    Candidate,
    ChoiceSettings,
    EvalSettings,
    OutputSettings,
    RunSettings,
)
from reap_stream.verifying import verify_directory

PRUNED: Final = "pruned"
EVALUATION: Final = "eval.json"
# Rows of training were as long.
_SEQUENCE_LENGTH: Final = 512


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """How much is done.

    Attributes:
        sparsities: fractions of experts to remove, each a checkpoint; the last is made by chance too.
        calibration: SPEC of the text that experts are scored on.
        calibration_rows: rows of it.
        held_out_rows: rows of each domain's held-out text.
        seed: of every random choice.
    """

    sparsities: tuple[str, ...] = ("0.25", "0.4", "0.5")
    calibration: str = "builtin"
    calibration_rows: int = 96
    held_out_rows: int = 32
    seed: int = 0


def run_demo(output: Path | None = None, settings: DemoSettings | None = None) -> DemoResult:
    """Prunes the model that ships to several sizes in one pass, verifies and evaluates each.

    Args:
        output: directory to make, in which the pruned checkpoints and the evaluation stay; None: a
            temporary one that is removed again.
        settings: how much is done; None: as the command does it.

    Raises:
        UsageError: `output` exists.
        ReapStreamError: something failed on the way.
    """
    settings = settings or DemoSettings()
    started = time.monotonic()
    with _directory(output) as directory:
        architecture = open_model(MODEL).architecture
        keeps = _keeps(architecture, settings)
        summary = prune(_run(settings), _targets(settings, directory / PRUNED))
        pruned = _pruned(directory, keeps)
        reports = [verify_directory(path, MODEL) for path in pruned]
        evaluation = evaluate(_evaluation(settings, pruned, keeps[-1]))
        document = evaluation.document()
        _write(directory / EVALUATION, document)
        return DemoResult(
            rows=_rows(architecture, settings, pruned, document["candidates"]),
            calibration=summary.details["calibration"],
            agreement=summary.details["split_half"].get(str(keeps[-1]), {}).get("mean"),
            evaluated_tokens=document["text"]["tokens"],
            tensors=sum(report.tensors for report in reports),
            verified_nbytes=sum(report.nbytes for report in reports),
            prune_seconds=summary.seconds,
            seconds=time.monotonic() - started,
            peak_nbytes=peak_resident_nbytes(),
        )


def _run(settings: DemoSettings) -> RunSettings:
    return RunSettings(
        model=MODEL,
        calibration=(settings.calibration,),
        samples=settings.calibration_rows,
        sequence_length=_SEQUENCE_LENGTH,
        seed=settings.seed,
        # So that every machine takes the same way.
        device="cpu",
        compute_dtype="float32",
    )


def _targets(settings: DemoSettings, output: Path) -> OutputSettings:
    shard_nbytes = max(path.stat().st_size for path in MODEL.glob("*.safetensors"))
    sparsity = ",".join(settings.sparsities)
    return OutputSettings(output=output, sparsity=sparsity, max_shard_nbytes=shard_nbytes)


def _pruned(directory: Path, keeps: Sequence[int]) -> list[Path]:
    """The checkpoints written; a single target has no folder of its own."""
    if len(keeps) == 1:
        return [directory / PRUNED]
    return [directory / PRUNED / f"keep-{keep}" for keep in keeps]


def _evaluation(settings: DemoSettings, pruned: Sequence[Path], keep: int) -> EvalSettings:
    """All models, and the smallest once more with experts chosen by chance."""
    chance = Candidate(
        scores=pruned[-1] / SCORES_FILE,
        keep=keep,
        choice=ChoiceSettings("random", settings.seed),
        label="by chance",
    )
    return EvalSettings(
        models=(MODEL, *pruned),
        text=tuple(str(path) for path in HELD_OUT.values()),
        candidates=(chance,),
        samples=settings.held_out_rows,
        sequence_length=_SEQUENCE_LENGTH,
        seed=settings.seed,
        device="cpu",
        compute_dtype="float32",
    )


def _rows(
    architecture: Architecture,
    settings: DemoSettings,
    pruned: Sequence[Path],
    found: Sequence[Mapping[str, Any]],
) -> tuple[Row, ...]:
    """One row a candidate of the evaluation, in its order."""
    labels = ["original", *(f"sparsity {s}" for s in settings.sparsities)]
    labels.append(f"{settings.sparsities[-1]} by chance")
    keeps = _keeps(architecture, settings)
    experts = [architecture.num_experts, *keeps, keeps[-1]]
    sizes = [*(_nbytes(path) for path in (MODEL, *pruned)), None]
    return tuple(
        Row(
            label=label,
            experts=keep,
            parameters=architecture.total_parameters(keep),
            nbytes=nbytes,
            losses={d: entry["sources"][str(path)]["loss"] for d, path in HELD_OUT.items()},
            kl=entry["all"]["kl"],
            top1=entry["all"]["top1_agreement"],
        )
        for label, keep, nbytes, entry in zip(labels, experts, sizes, found, strict=True)
    )


def _keeps(architecture: Architecture, settings: DemoSettings) -> list[int]:
    groups = architecture.routing.groups
    return [kept_count(architecture.num_experts, s, groups) for s in settings.sparsities]


def _nbytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _write(path: Path, document: Mapping[str, Any]) -> None:
    with output_errors(path):
        text = json.dumps(document, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


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
