"""What counting words is worth: the loss of a unigram's and a bigram's probabilities.

Both are counted on the training tokens of the very domain that they are tried on, so they know
which domain they are in and the model must find out.

    unigram   p(b)     = (n(b) + 1) / (n + V)
    bigram    p(b | a) = (n(ab) + t(a) p(b)) / (n(a) + t(a)),   t(a) different tokens follow a

The bigram's smoothing is Witten and Bell's (IEEE Transactions on Information Theory 37, 1991).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.integer]


class Counts:
    """Tokens and pairs of tokens of a text.

    Args:
        tokens: [tokens], ids below `vocabulary`.
        vocabulary: V.
    """

    def __init__(self, tokens: Tokens, vocabulary: int) -> None:
        ids = tokens.astype(np.int64)
        self._vocabulary = vocabulary
        counts = np.bincount(ids, minlength=vocabulary)
        self._unigram = (counts + 1) / (ids.size + vocabulary)
        pairs = ids[:-1] * vocabulary + ids[1:]
        self._pairs, self._pair_counts = np.unique(pairs, return_counts=True)
        firsts = self._pairs // vocabulary
        self._followed = np.bincount(ids[:-1], minlength=vocabulary)
        self._followers = np.bincount(firsts, minlength=vocabulary)

    def unigram_loss(self, rows: Sequence[Tokens]) -> float:
        """Mean loss in nats of every token of the rows but each row's first."""
        _, after = _pairs_of(rows)
        return float(-np.log(self._unigram[after]).mean())

    def bigram_loss(self, rows: Sequence[Tokens]) -> float:
        """The same, each token after the one before it."""
        before, after = _pairs_of(rows)
        wanted = before * self._vocabulary + after
        place = np.searchsorted(self._pairs, wanted).clip(max=self._pairs.size - 1)
        seen = np.where(self._pairs[place] == wanted, self._pair_counts[place], 0)
        backed = np.where(self._followers[before] > 0, self._followers[before], 1)
        likely = (seen + backed * self._unigram[after]) / (self._followed[before] + backed)
        return float(-np.log(likely).mean())


def _pairs_of(rows: Sequence[Tokens]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    before = np.concatenate([row[:-1] for row in rows]).astype(np.int64)
    after = np.concatenate([row[1:] for row in rows]).astype(np.int64)
    return before, after
