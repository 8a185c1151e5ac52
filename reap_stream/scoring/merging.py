"""Several calibration runs of one model as one: statistics are sums, so runs merge by addition."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from reap_stream.errors import CalibrationError
from reap_stream.scoring.saliency import LayerStats, Scores

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROWS = "calibration_sha256"
_PROPAGATE = "propagate"
_ORIGINS = "origins"


def merge_scores(runs: Sequence[Scores]) -> Scores:
    """Merge several calibration runs of one model.

    Rows of sources with the same label are summed, other sources are appended in the order in
    which they come. Metadata is kept where all runs agree on it, statistics of later versions where
    all have them; records of where rows came from are put one after another.

    Raises:
        CalibrationError: no run is given, two differ in model, layers, experts or
            propagation, or two were taken on the same calibration rows.
    """
    if not runs:
        raise CalibrationError("no scores to merge: give at least one file")
    first = runs[0]
    for number, run in enumerate(runs, start=1):
        run.check(f"scores {number}")
        _check_same_model(first, run, number)
        _check_other_rows(runs[: number - 1], run, number)
    sources = tuple(dict.fromkeys(label for run in runs for label in run.sources))
    layers: dict[int, LayerStats] = {}
    for layer in sorted(first.layers):
        layers[layer] = LayerStats.zeros(len(sources), first.num_experts)
        for run in runs:
            layers[layer].add(_spread(run.layers[layer], run.sources, sources))
    shared = {
        key: value
        for key, value in first.metadata.items()
        if all(run.metadata.get(key) == value for run in runs)
    }
    if all(_ORIGINS in run.metadata for run in runs):
        shared[_ORIGINS] = _joined([run.metadata[_ORIGINS] for run in runs])
    return Scores(layers, sources, first.num_experts, first.model_fingerprint, shared)


def _check_same_model(first: Scores, run: Scores, number: int) -> None:
    for what, mine, other in (
        ("model", first.model_fingerprint, run.model_fingerprint),
        ("number of experts", first.num_experts, run.num_experts),
        ("MoE layers", sorted(first.layers), sorted(run.layers)),
        ("propagation", first.metadata.get(_PROPAGATE), run.metadata.get(_PROPAGATE)),
    ):
        if mine != other:
            raise CalibrationError(
                f"scores {number} cannot be merged with scores 1: their {what} is {other}, not {mine}"
            )


def _check_other_rows(before: Sequence[Scores], run: Scores, number: int) -> None:
    rows = run.metadata.get(_ROWS)
    for earlier, known in enumerate(before, start=1):
        if rows is not None and known.metadata.get(_ROWS) == rows:
            raise CalibrationError(
                f"scores {number} were taken on the same calibration rows as scores {earlier} "
                f"(sha256 {rows[:12]}…) and would count twice: leave one of them out"
            )


def _joined(lists: Sequence[str]) -> str:
    """JSON lists as one; each entry once, since runs on one source may be merged again."""
    entries: list[Any] = []
    for text in lists:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"metadata 'origins' of scores is no JSON: {error}") from error
        if not isinstance(found, list):
            raise CalibrationError("metadata 'origins' of scores is no JSON list")
        entries += [entry for entry in found if entry not in entries]
    return json.dumps(entries, ensure_ascii=False)


def _spread(stats: LayerStats, labels: tuple[str, ...], sources: tuple[str, ...]) -> LayerStats:
    """Return the statistics with the rows of `labels` laid out as `sources`, others zero."""
    rows = [sources.index(label) for label in labels]
    wide = {}
    for name, array in stats.arrays().items():
        wide[name] = np.zeros((len(sources), stats.shape[1]), array.dtype)
        wide[name][rows] = array
    return LayerStats.of_arrays(wide)
