"""Prune then quantise, or quantise then prune: the same bfloat16 model both ways."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from quality.figures import Kept, overlap, paired
from quality.measuring import (
    REFERENCE,
    candidate,
    compared,
    keep_at,
    kept_sets,
    observed,
    written,
)
from quality.study import Study
from quality.tables import listed, percent, plus_minus, table
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.scoring.scores_file import load_scores

SPARSITIES = ("0.25", "0.5")
ORDERS = ("prune-first", "quantise-first")
FP8 = "fp8"
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(.+)")


def measure(study: Study) -> dict[str, Any]:
    """bfloat16 → prune → FP8, and bfloat16 → FP8 → prune."""
    if study.bf16 is None:
        sys.exit("this question compares a bfloat16 model with its FP8 form: give --bf16")
    scores = observed(study, "scores-bf16", study.calibration(), study.bf16)
    whole = candidate(scores, study.num_experts, name=FP8)
    fp8 = written(study, whole, model=study.bf16, weights="fp8")
    fp8_scores = observed(study, "scores-fp8", study.calibration(), fp8)
    models: list[Path] = []
    overlaps, compared_bytes = {}, {}
    for sparsity in SPARSITIES:
        keep = keep_at(study, sparsity)
        first, second = (
            candidate(path, keep, name=f"{order}-{sparsity}")
            for path, order in zip((scores, fp8_scores), ORDERS, strict=True)
        )
        pair = (
            written(study, first, model=study.bf16, weights="fp8"),
            written(study, second, model=fp8),
        )
        sets = [kept_sets(study, load_scores(path), keep) for path in (scores, fp8_scores)]
        overlaps[sparsity] = overlap(*sets)
        compared_bytes[sparsity] = _same_bytes(pair, sets)
        models += pair
    unquantised = [candidate(scores, keep_at(study, s), name=f"bf16 {s}") for s in SPARSITIES]
    found = compared(study, unquantised, (study.bf16, fp8, *models))
    return {"overlaps": overlaps, "same_bytes": compared_bytes, "candidates": found}


def fields(result: dict[str, Any]) -> dict[str, str]:
    """One table, and how much the order matters."""
    found = result["candidates"]
    rows = [_row(found, REFERENCE, "(unpruned)", "bfloat16"), _row(found, FP8, "(unpruned)", "FP8")]
    for s in SPARSITIES:
        rows.append(_row(found, f"bf16 {s}", percent(float(s)), "bfloat16, not quantised"))
        rows.append(_row(found, f"{ORDERS[0]}-{s}", percent(float(s)), "pruned, then FP8"))
        rows.append(_row(found, f"{ORDERS[1]}-{s}", percent(float(s)), "FP8, then pruned"))
    gaps = [_order(found, s) for s in SPARSITIES]
    shared = [f"{percent(result['overlaps'][s])} at {percent(float(s))}" for s in SPARSITIES]
    same, all_ = (sum(result["same_bytes"][s][i] for s in SPARSITIES) for i in (0, 1))
    return {
        "table": table(["sparsity", "weights", "loss", "KL from bfloat16"], rows),
        "fp8_cost": plus_minus(paired(found[REFERENCE], found[FP8]), 4, signed=True),
        "order": listed(gaps),
        "overlap": listed(shared),
        "bytes": f"{same:,} of {all_:,}",
    }


def _row(found: dict[str, Any], name: str, sparsity: str, weights: str) -> list[str]:
    entry = found[name]
    return [sparsity, weights, f"{entry['loss']:.4f}", f"{entry['kl']:.4f}"]


def _order(found: dict[str, Any], sparsity: str) -> str:
    first, second = (found[f"{order}-{sparsity}"] for order in ORDERS)
    return f"{plus_minus(paired(first, second), 4, signed=True)} at {percent(float(sparsity))}"


def _same_bytes(pair: tuple[Path, Path], sets: list[Kept]) -> tuple[int, int]:
    """Of the tensors of experts that both models keep, how many are the same bytes."""
    one, other = (_by_original(path, kept) for path, kept in zip(pair, sets, strict=True))
    shared = one.keys() & other.keys()
    same = sum(np.array_equal(_bytes(one[key]), _bytes(other[key])) for key in shared)
    return same, len(shared)


def _by_original(model: Path, kept: Kept) -> dict[tuple[int, int, str], TensorRef]:
    """An expert's tensors under the number it had before pruning."""
    found = {}
    for name, ref in open_checkpoint(model).tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is not None:
            layer, expert = int(match[1]), int(match[2])
            found[layer, kept[layer][expert], match[3]] = ref
    return found


def _bytes(ref: TensorRef) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.fromfile(ref.file, np.uint8, count=ref.nbytes, offset=ref.offset)
