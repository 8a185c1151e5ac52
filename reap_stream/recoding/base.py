"""What an encoder is: how the numbers of a weight become the tensors of a format.

The counterpart of `reap_stream.formats`: there bytes become numbers, here numbers become bytes. An
encoder works on rows of a matrix, so that a large weight can pass through memory piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from reap_stream.checkpoint.dtypes import tensor_nbytes
from reap_stream.checkpoint.recipes import Bytes
from reap_stream.formats import Weight


@dataclass(frozen=True, slots=True)
class Part:
    """One of the tensors that stand for a weight [rows, columns].

    Attributes:
        suffix: what its name adds to the weight's.
        dtype: safetensors dtype tag.
        shape: its shape; dimension 0 runs along the weight's rows.
        rows: rows of the weight behind one index of dimension 0 (the last may have fewer).
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    rows: int = 1

    def offset(self, row: int) -> int:
        """The first byte that speaks of `row`, a multiple of `rows`."""
        nbytes = tensor_nbytes(self.dtype, self.shape)
        return nbytes // self.shape[0] * (row // self.rows) if self.shape[0] else 0


class Encoder(Protocol):
    """One way of storing weights.

    Attributes:
        name: as ``--weights`` has it.
        rows: rows that must be encoded together; 1 where each stands alone.
        exact: dtype in which weights are decoded before they are encoded.
    """

    name: str
    rows: int
    exact: torch.dtype

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """The tensors of a weight of that shape; of dimensions before the last two one matrix."""
        ...

    def holds(self, weight: Weight) -> bool:
        """Whether a weight of the source is stored in this way already."""
        ...

    def encode(self, values: torch.Tensor, where: str) -> tuple[Bytes, ...]:
        """Encodes rows of a weight.

        Args:
            values: [n, columns], contiguous, on the CPU, of a floating dtype; n is a multiple of
                `rows`, or the rows are the weight's last.
            where: file and tensor, for messages.

        Returns:
            The bytes of each of `parts`, in that order, uint8.

        Raises:
            OutputError: values that the format cannot hold.
        """
        ...

    def quantization_config(self, ignored: Sequence[str]) -> dict[str, Any] | None:
        """What config.json must say of such weights.

        Args:
            ignored: modules with a weight matrix that is not stored in this way.

        Returns:
            The value of ``quantization_config``; None where there is nothing to say.
        """
        ...
