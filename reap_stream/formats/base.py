"""What a weight format is: which tensors belong together, and how their bytes become numbers.

A checkpoint stores a weight as one tensor or as a few (codes, scales, zero points). The rest of
the package speaks of *weights*: the name transformers knows, the parts on disk, the logical
shape. A format is one small file that recognises its weights and decodes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from reap_stream.checkpoint.refs import TensorRef


class WeightFormat(Protocol):
    """One way of storing a weight."""

    name: str

    def claim(self, name: str, tensors: Mapping[str, TensorRef]) -> Weight | None:
        """The weight that tensor `name` is the main part of, or None when it is of no such.

        The weight's own name need not be the tensor's: `X.weight_packed` makes `X.weight`.
        """
        ...

    def refusal(self, weight: Weight) -> str | None:
        """Why the weight cannot be decoded, or None when it can."""
        ...

    def decode(self, weight: Weight, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Writes the weight's values into `out`.

        Args:
            weight: the weight.
            parts: the tensors of `weight.parts` by role, in the checkpoint's dtype, on the
                device of `out`.
            out: tensor of the weight's logical shape, bfloat16, float16 or float32.
        """
        ...


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of the checkpoint.

    Attributes:
        name: the key transformers knows it by.
        shape: logical shape.
        format: how it is stored.
        parts: role ("weight", "scale", ...) → tensor that the decoder reads.
        transposed: the rows on disk are the columns of the weight (its last two dimensions).
    """

    name: str
    shape: tuple[int, ...]
    format: WeightFormat = field(compare=False)
    parts: Mapping[str, TensorRef]
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all parts on disk."""
        return sum(ref.nbytes for ref in self.parts.values())

    @property
    def is_plain(self) -> bool:
        """Whether the bytes on disk already are the numbers."""
        return self.format.name == "plain"

    def empty(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Room for the values, laid out so that decoding writes them in the order of the bytes."""
        if not self.transposed:
            return torch.empty(self.shape, dtype=dtype, device=device)
        *outer, rows, columns = self.shape
        return torch.empty((*outer, columns, rows), dtype=dtype, device=device).transpose(-1, -2)


def member(weight: Weight, index: int) -> Weight:
    """The weight of one expert of a fused weight, whose experts lie along the first dimension.

    Args:
        weight: a weight all of whose parts have the experts along their first dimension too.
        index: number of the expert.
    """
    parts = {}
    for role, ref in weight.parts.items():
        nbytes = ref.nbytes // ref.shape[0]
        parts[role] = replace(
            ref, shape=ref.shape[1:], offset=ref.offset + index * nbytes, nbytes=nbytes
        )
    return replace(weight, shape=weight.shape[1:], parts=parts)
