"""When a continuation counts as a loop.

A continuation loops if it did not end by itself and its last max(4n, 16) tokens have a period of n
tokens, 1 <= n <= 16: an n-gram stands there at least four times back to back. Sixteen tokens at the
least, so that a run of dashes or blanks is none.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_PERIOD = 16
REPEATS = 4
LEAST_TOKENS = 16


def loop_period(tokens: Sequence[int]) -> int:
    """The shortest period that the end of a text repeats with, in tokens; 0: none."""
    for period in range(1, LONGEST_PERIOD + 1):
        span = max(REPEATS * period, LEAST_TOKENS)
        if span > len(tokens):
            continue
        end = tokens[len(tokens) - span :]
        if all(a == b for a, b in zip(end, end[period:], strict=False)):
            return period
    return 0


def until_end(tokens: Sequence[int], end: int) -> tuple[list[int], bool]:
    """The tokens before the first `end`, and whether there was one."""
    listed = list(tokens)
    return (listed[: listed.index(end)], True) if end in listed else (listed, False)


def distinct_share(tokens: Sequence[int], width: int = 4) -> float:
    """Different n-grams of a text ÷ all of them; 1 for a text too short to hold two."""
    grams = [tuple(tokens[i : i + width]) for i in range(len(tokens) - width + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
