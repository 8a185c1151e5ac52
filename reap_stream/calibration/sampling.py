"""A uniform sample of rows in one pass, without knowing how many there are.

Every candidate gets a random number from the seed and those with the N smallest stay, in their own
order. Whether a row is long enough is only known once it is made, and it is made only if its number
would let it stay.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np

from reap_stream.calibration.encoding import Tokens

MIN_ROW_TOKENS: Final = 2
"""A row of one token has no context to calibrate with and nothing to predict."""

Candidate = Callable[[], Tokens]
"""Makes a row when called."""


def draw(candidates: Iterable[Candidate], limit: int | None, seed: int) -> tuple[list[Tokens], int]:
    """Return the rows drawn, in their own order, and how many were too short to be of use.

    A row that is too short takes no place from others, so the sample is uniform over the usable
    rows; of those not drawn nobody knows whether they were.
    """
    if limit == 0:
        return [], 0
    random = np.random.default_rng(seed)
    drawn: list[tuple[float, int, Tokens]] = []
    skipped = 0
    for number, make in enumerate(candidates):
        key = -random.random()
        full = limit is not None and len(drawn) >= limit
        if full and key <= drawn[0][0]:
            continue
        tokens = make()
        if tokens.size < MIN_ROW_TOKENS:
            skipped += 1
        elif full:
            heapq.heapreplace(drawn, (key, number, tokens))
        else:
            heapq.heappush(drawn, (key, number, tokens))
    return [tokens for _, _, tokens in sorted(drawn, key=lambda entry: entry[1])], skipped
