"""How the experts share the work: which are dead, and how much an expert says of the domain."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

# An expert with less than this part of the mean load is dead.
DEAD_SHARE = 0.1


def routing_record(
    loads: Mapping[str, NDArray[np.int64]], first_layer: int
) -> list[dict[str, Any]]:
    """What the loads of each layer say.

    Args:
        loads: domain → tokens sent to each expert [layers, experts]. Domains count alike, however
            many tokens they have.
        first_layer: number of the first of these layers in the model.

    Returns:
        For each layer its number; ``dead``, experts with less than a tenth of the mean load;
        ``largest``, the largest load over the mean; ``bits``, the mutual information of expert and
        domain (log2 of the number of domains where each expert serves one alone, 0 where all are
        used alike); ``overlap``, the share that the most used quarters of the experts of two
        domains have in common, mean over pairs of domains (a quarter by chance).
    """
    shares = np.stack([load / load.sum(axis=1, keepdims=True) for load in loads.values()])
    return [
        {"layer": first_layer + number, **_layer_record(shares[:, number])}
        for number in range(shares.shape[1])
    ]


def _layer_record(shares: NDArray[np.float64]) -> dict[str, Any]:
    """Of one layer's shares [domains, experts], each row adding up to 1."""
    domains, experts = shares.shape
    mean = shares.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shares > 0, shares * np.log2(shares / mean), 0.0)
    top = np.argsort(-shares, axis=1, kind="stable")[:, : experts // 4]
    common = [
        np.intersect1d(top[a], top[b]).size / top.shape[1]
        for a, b in combinations(range(domains), 2)
    ]
    return {
        "dead": int((mean < DEAD_SHARE / experts).sum()),
        "largest": round(float(mean.max() * experts), 3),
        "bits": round(float(terms.sum() / domains), 4),
        "overlap": round(float(np.mean(common)), 4),
    }
