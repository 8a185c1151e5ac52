"""A uniform sample of rows in one pass, without knowing how many there are.

Every candidate gets a random number from the seed and those with the N smallest stay, in their own
order. Whether a row is long enough is only known once it is made, and it is made only if its number
would let it stay.

What comes over a network is not read to its end: `Window` says when enough was seen to draw from.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from reap_stream.calibration.encoding import NOTHING_NEW, Tokens

MIN_ROW_TOKENS: Final = 2
"""A row of one token has no context to calibrate with and nothing to predict."""

# How many times as many candidates as would be enough are seen before a stream is given up.
_PATIENCE: Final = 10

Candidate = Callable[[], Tokens]
"""Makes a row when called."""


@dataclass(frozen=True, slots=True)
class Window:
    """How much of a stream is looked at: a sample is then uniform over that much of it.

    Attributes:
        per_row: candidates seen for each one drawn.
        least: candidates seen however few are drawn.
    """

    per_row: int
    least: int

    def is_enough(self, seen: int, drawn: int) -> bool:
        """Whether the stream can end here, with nothing missing from what was asked for."""
        return seen >= max(self.least, self.per_row * drawn)

    def is_hopeless(self, seen: int, usable: int) -> bool:
        """Whether usable rows are so rare that the stream ends here, though some are missing."""
        return seen >= _PATIENCE * max(self.least, self.per_row * usable)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A sample.

    Attributes:
        rows: those drawn, in their own order.
        skipped: how many were too short to be of use; of those not made nobody knows.
        seen: how many there were to choose from.
        gave_up: a stream was left before its end with too few usable rows.
    """

    rows: list[Tokens]
    skipped: int
    seen: int
    gave_up: bool = False


def draw(
    candidates: Iterable[Candidate], limit: int | None, seed: int, window: Window | None = None
) -> Drawn:
    """Draw rows.

    A row that is too short takes no place from others, so the sample is uniform over the usable
    rows.

    Args:
        candidates: the rows, to be made.
        limit: the most rows; None for all.
        seed: 0 or more.
        window: when to stop reading; None: at the end.
    """
    random = np.random.default_rng(seed)
    drawn: list[tuple[float, int, Tokens]] = []
    skipped = seen = 0
    gave_up = False
    for number, make in enumerate(candidates if limit != 0 else ()):
        key = -random.random()
        seen += 1
        full = limit is not None and len(drawn) >= limit
        if not (full and key <= drawn[0][0]):
            tokens = make()
            if tokens.size < MIN_ROW_TOKENS:
                skipped += tokens is not NOTHING_NEW
            elif full:
                heapq.heapreplace(drawn, (key, number, tokens))
            else:
                heapq.heappush(drawn, (key, number, tokens))
        if window is not None and len(drawn) == limit and window.is_enough(seen, len(drawn)):
            break
        if window is not None and len(drawn) != limit and window.is_hopeless(seen, len(drawn)):
            gave_up = True
            break
    rows = [tokens for _, _, tokens in sorted(drawn, key=lambda entry: entry[1])]
    return Drawn(rows, skipped, seen, gave_up)


def shares(limit: int | None, parts: int) -> list[int | None]:
    """Divide a limit among the parts of a mix; the first ones get what does not divide."""
    if limit is None:
        return [None] * parts
    return [(limit + parts - 1 - part) // parts for part in range(parts)]
