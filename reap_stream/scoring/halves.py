"""Two halves of the calibration rows, so that it shows how far the choice of experts depends on them.

The rows of a source are dealt in the order 0 1 1 0 1 0 0 1 … (the Thue-Morse sequence: whether the
row's number has an odd number of ones in binary). Plain turns would sort rows that alternate between
kinds of text, as those of ``builtin`` do, into halves by kind.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

HALVES = 2


def half_of_row(number: int) -> int:
    """The half, 0 or 1, of a source's row; of n rows, the halves get as many, give or take one."""
    return number.bit_count() % HALVES


def row_shares(sources: Iterable[int]) -> NDArray[np.int32]:
    """Where the sums of each row go: ``HALVES * source + half``.

    Args:
        sources: the calibration source of each row, in the order of the corpus.

    Returns:
        int32 [rows].
    """
    seen: Counter[int] = Counter()
    shares = []
    for source in sources:
        shares.append(HALVES * source + half_of_row(seen[source]))
        seen[source] += 1
    return np.array(shares, dtype=np.int32)
