"""Which rows run together, and how a batch's flat tokens become a padded rectangle and back.

Rows of like length share a batch, so that little is padding. Hidden states are stored in batch
order without padding: each batch is one contiguous range, each of its rows a range within it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reap_stream.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that run together.

    Attributes:
        row_indices: numbers of the rows in the corpus.
        rows: range of each row's tokens in storage.
        lengths: tokens of each row, the longest first.
        width: tokens of the longest row.
        start: first token of the batch in storage.
        stop: one past its last token.
    """

    row_indices: tuple[int, ...]
    rows: tuple[slice, ...]
    lengths: tuple[int, ...]
    width: int
    start: int
    stop: int

    @property
    def padded(self) -> bool:
        """Whether the rows differ in length."""
        return self.lengths[-1] != self.width


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[Batch]:
    """Group rows so that rows x longest row is at most `batch_tokens`, at least one row each.

    The longest rows come first, rows of one length in corpus order: the batch that needs the most
    memory is then the first to run.

    Args:
        lengths: tokens of each row of the corpus, each at least 1.
        batch_tokens: the most tokens a batch may hold, padding included; a longer row runs alone.

    Raises:
        UsageError: `batch_tokens` or a length is below 1.
    """
    if batch_tokens < 1 or min(lengths, default=1) < 1:
        raise UsageError(
            f"cannot batch rows of {min(lengths, default=1)} tokens and more into batches of"
            f" {batch_tokens} tokens: both must be at least 1"
        )
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches: list[Batch] = []
    first = start = 0
    while first < len(order):
        rows_per_batch = max(1, batch_tokens // lengths[order[first]])
        batch = _batch(order[first : first + rows_per_batch], lengths, start)
        batches.append(batch)
        first += rows_per_batch
        start = batch.stop
    return batches


def pad(flat: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Lay a batch's tokens out as a rectangle, zeros to the right of short rows.

    Args:
        flat: [tokens of the batch, ...], e.g. hidden states or token ids.
        batch: the batch they belong to.

    Returns:
        [rows, width, ...] of the same dtype and device; a view where no row is padded.
    """
    if not batch.padded:
        return flat.view(len(batch.rows), batch.width, *flat.shape[1:])
    out = flat.new_zeros((len(batch.rows), batch.width, *flat.shape[1:]))
    for number, row in enumerate(batch.rows):
        out[number, : batch.lengths[number]] = flat[
            row.start - batch.start : row.stop - batch.start
        ]
    return out


def unpad(rectangle: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Undo `pad`: [rows, width, ...] to [tokens of the batch, ...]; a view where none is padded."""
    if not batch.padded:
        return rectangle.reshape(batch.stop - batch.start, *rectangle.shape[2:])
    return torch.cat([row[:length] for row, length in zip(rectangle, batch.lengths, strict=True)])


def valid_mask(batch: Batch) -> torch.Tensor:
    """Return bool [rows * width] on the CPU: True where the rectangle holds a token."""
    lengths = torch.tensor(batch.lengths)
    return (torch.arange(batch.width) < lengths[:, None]).reshape(-1)


def _batch(row_indices: Sequence[int], lengths: Sequence[int], start: int) -> Batch:
    rows = []
    stop = start
    for row in row_indices:
        rows.append(slice(stop, stop + lengths[row]))
        stop += lengths[row]
    own = tuple(lengths[row] for row in row_indices)
    return Batch(tuple(row_indices), tuple(rows), own, own[0], start, stop)
