"""Small sums behind the figures: intervals, spreads, overlaps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Kept = Mapping[int, Sequence[int]]

# Half the width of a 95 % interval, in standard errors.
Z_95 = 1.959964


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a rate by Wilson's score, which holds near 0 and 1 too.

    Args:
        hits: how often it happened.
        count: how often it could have, at least 1.

    Returns:
        Lower and upper end, within [0, 1].
    """
    if not 0 <= hits <= count or count == 0:
        message = f"{hits} of {count} is no rate"
        raise ValueError(message)
    rate, square = hits / count, Z_95**2
    centre = (rate + square / (2 * count)) / (1 + square / count)
    spread = math.sqrt(rate * (1 - rate) / count + square / (4 * count**2))
    half = Z_95 * spread / (1 + square / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample (n - 1); 0 deviation for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), deviation


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    mean, deviation = mean_and_deviation(values)
    return mean, deviation / math.sqrt(len(values))


def overlap(one: Kept, other: Kept) -> float:
    """The share of kept experts that two prunings of as many have in common, over all layers."""
    if {i: len(kept) for i, kept in one.items()} != {i: len(kept) for i, kept in other.items()}:
        message = "kept sets of different layers or sizes cannot be compared"
        raise ValueError(message)
    shared = sum(len(set(one[layer]) & set(other[layer])) for layer in one)
    return shared / sum(len(kept) for kept in one.values())


def paired(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """How much more `other` loses than `one` on the same text: mean over folds, standard error."""
    pairs = zip(one["folds"], other["folds"], strict=True)
    return mean_and_error([theirs - ours for ours, theirs in pairs])


def sign_test(one: int, other: int) -> float:
    """Two-sided exact p of so uneven a split, or a more uneven one, were both ways as likely.

    Of paired hits and misses, with the pairs that changed one way and the other: McNemar's test.
    """
    count, fewer = one + other, min(one, other)
    tail = sum(math.comb(count, k) for k in range(fewer + 1)) / (1 << count)
    return min(1.0, 2 * tail)
