"""Random statistics of a layer, and the criteria as the paper writes them."""

from __future__ import annotations

import numpy as np

from reap_stream.scoring.saliency import SUMS, LayerStats

SOURCES = ("a.jsonl:4", "builtin")


def make_stats(seed, sources=2, experts=8):
    """Sums that two halves of the rows lead to; expert 0 is never reached."""
    rng = np.random.default_rng(seed)
    stats = LayerStats.zeros(sources, experts)
    for name, dtype in SUMS.items():
        shape = (sources, experts)
        even, odd = (
            (rng.integers(1, 99, shape) if name == "tokens" else 9 * rng.random(shape)).astype(
                dtype
            )
            for _ in range(2)
        )
        getattr(stats, name)[:] = even + odd
        getattr(stats.odd, name)[:] = odd
    stats.norm_max[:], stats.output_max[:] = rng.random((2, sources, experts))
    for array in stats.arrays().values():
        array[:, 0] = 0
    stats.check()
    return stats


def naive_scores(stats, method, weights):
    """The criterion as the paper writes it, source by source, in plain numbers."""
    sums = {"reap": "gate_norm_sum", "ean": "norm_sum", "gate": "gate_sum"}
    out = []
    for expert in range(stats.shape[1]):
        tokens = sum(w * int(n) for w, n in zip(weights, stats.tokens[:, expert], strict=True))
        if method == "frequency":
            out.append(tokens)
            continue
        terms = getattr(stats, sums[method])[:, expert]
        total = sum(w * float(x) for w, x in zip(weights, terms, strict=True))
        out.append(total / tokens if tokens else 0.0)
    return out
