"""What is known of each token of the text, in the order in which hidden states are stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from reap_stream.calibration.batches import plan_batches
from reap_stream.calibration.corpus import Corpus


@dataclass(frozen=True, slots=True)
class Positions:
    """The tokens of all rows, one after the other.

    Attributes:
        targets: int64 [tokens], the token that follows in the row; -1 at a row's end.
        sources: int32 [tokens], the text each is from.
        num_sources: number of texts.
    """

    targets: torch.Tensor
    sources: torch.Tensor
    num_sources: int


def read_positions(corpus: Corpus, batch_tokens: int) -> Positions:
    """Lays the rows out as the batches of a pass do.

    Args:
        corpus: the rows.
        batch_tokens: tokens of a batch, as the pass has it.
    """
    targets = np.full(corpus.num_tokens, -1, dtype=np.int64)
    sources = np.zeros(corpus.num_tokens, dtype=np.int32)
    for batch in plan_batches([row.tokens.size for row in corpus.rows], batch_tokens):
        for number, where in zip(batch.row_indices, batch.rows, strict=True):
            row = corpus.rows[number]
            targets[where.start : where.stop - 1] = row.tokens[1:]
            sources[where] = row.source
    return Positions(torch.from_numpy(targets), torch.from_numpy(sources), len(corpus.sources))
