"""Scores of whole numbers, whose sums are exact in any order."""

from __future__ import annotations

import numpy as np

from reap_stream.scoring.saliency import (
    LayerStats,
    Scores,
)

EXPERTS = 5


def make_stats(rng, sources, experts=EXPERTS):
    """Whole numbers, so that sums are exact in any order; expert 0 is never reached."""
    stats = LayerStats.zeros(sources, experts)
    for name, array in stats.arrays().items():
        # Half of the rows send an expert fewer tokens than all do.
        array[:] = rng.integers(1, 500, array.shape) + 500 * (not name.startswith("odd."))
        array[:, 0] = 0
    return stats


def make_scores(seed, sources=("a.jsonl:4", "builtin"), numbers=(1, 2, 10), **changes):
    rng = np.random.default_rng(seed)
    fields = {
        "layers": {layer: make_stats(rng, len(sources)) for layer in numbers},
        "sources": sources,
        "num_experts": EXPERTS,
        "model_fingerprint": "abc",
        "metadata": {"corpus": "00ff", "seed": str(seed)},
    }
    return Scores(**{**fields, **changes})


def by_label(scores):
    return {
        (layer, label, name): array[row].tolist()
        for layer, stats in scores.layers.items()
        for row, label in enumerate(scores.sources)
        for name, array in stats.arrays().items()
    }
