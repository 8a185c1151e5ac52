"""Which batches a rank runs: all ranks plan the same batches, and each takes whole ones.

A batch is never cut, so its hidden states are, bit for bit, those of a job of one process.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reap_stream.calibration.batches import Batch


def deal(batches: Sequence[Batch], rank: int, size: int) -> list[Batch]:
    """The batches of one rank, in their order, laid out in storage of its own.

    Each batch goes to the rank that has the fewest tokens by then, padding counted, since it takes
    time too. With more ranks than batches some get none.

    Args:
        batches: all batches, the largest first.
        rank: whose share is wanted.
        size: how many ranks there are.
    """
    loads = [0] * size
    own: list[Batch] = []
    start = 0
    for batch in batches:
        taker = loads.index(min(loads))
        loads[taker] += len(batch.rows) * batch.width
        if taker == rank:
            own.append(_moved(batch, start))
            start = own[-1].stop
    return own


def dealt_tokens(batches: Sequence[Batch]) -> int:
    """The tokens of some batches, padding left out."""
    return sum(batch.stop - batch.start for batch in batches)


def _moved(batch: Batch, start: int) -> Batch:
    shift = start - batch.start
    rows = tuple(slice(row.start + shift, row.stop + shift) for row in batch.rows)
    return replace(batch, rows=rows, start=start, stop=batch.stop + shift)
