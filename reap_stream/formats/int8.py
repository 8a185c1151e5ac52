"""INT8 weights with float scales: compressed-tensors' ``int-quantized`` (W8A8) and its like.

Layouts of a weight X.weight I8 [N, K]:

* ``X.weight_scale`` [N, 1], [N] or of one element; [N, G] in groups of neighbours of a row;
* ``X.weight_scale_inv`` or ``X.weight_scale`` [ceil(N/bn), ceil(K/bk)]: blocks (DeepSeek in INT8);
* ``X.weight_zero_point`` I8 [N, 1] or [N, G], of asymmetric schemes.

value = (code − zero point) × scale. All this goes for experts that lie in one tensor [E, N, K] too,
their scales having E in front. Scales of activations (``input_scale``) do not change weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats.base import Weight, member
from reap_stream.formats.rearranged import RearrangedCodes

_SCALE_SUFFIXES: Final = ("_scale_inv", "_scale")
_SCALE_DTYPES: Final = ("F32", "BF16", "F16")
_MATRIX: Final = 2
_STACK: Final = 3


class Int8:
    """Signed bytes with their scales.

    Args:
        block: rows and columns of a block, as the config names it; None where it names none.
    """

    name = "int8"

    def __init__(self, block: tuple[int, int] | None = None) -> None:
        self.block = block

    def claim(self, name: str, tensors: Mapping[str, TensorRef]) -> Weight | None:
        """Claims I8 matrices named as weights; other I8 tensors are zero points and buffers."""
        ref = tensors[name]
        has_scale = any(name + suffix in tensors for suffix in _SCALE_SUFFIXES)
        is_weight = has_scale or name.endswith(".weight")
        if ref.dtype != "I8" or not is_weight or len(ref.shape) < _MATRIX:
            return None
        parts = {"weight": ref}
        scale = next((n for s in _SCALE_SUFFIXES if (n := name + s) in tensors), None)
        if scale is not None:
            parts["scale"] = tensors[scale]
        if f"{name}_zero_point" in tensors:
            parts["zero_point"] = tensors[f"{name}_zero_point"]
        return Weight(name, ref.shape, self, parts)

    def refusal(self, weight: Weight) -> str | None:
        """Refuses a missing scale, and scales and zero points that fit no layout."""
        scale, zero = weight.parts.get("scale"), weight.parts.get("zero_point")
        if scale is None:
            return (
                f"INT8 tensor {weight.name!r} has no scale ({weight.name}_scale): its values cannot "
                "be known"
            )
        if len(weight.shape) not in (_MATRIX, _STACK):
            return (
                f"INT8 tensor {weight.name!r} has {len(weight.shape)} dimensions, expected 2 or 3"
            )
        if scale.dtype not in _SCALE_DTYPES:
            return f"scale {scale.name!r} has dtype {scale.dtype}, expected one of {_SCALE_DTYPES}"
        stacked = len(weight.shape) == _STACK
        companions = [ref for ref in (scale, zero) if ref is not None]
        if stacked and any(ref.shape[:1] != weight.shape[:1] for ref in companions):
            return (
                f"scale {scale.name!r} has shape {list(scale.shape)}, expected {weight.shape[0]} "
                f"experts in front as {weight.name!r} {list(weight.shape)} has"
            )
        return self._layout_fault(member(weight, 0) if stacked else weight)

    def decode(self, weight: Weight, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Subtracts zero points and multiplies by scales."""
        if len(weight.shape) == _STACK:
            for index in range(weight.shape[0]):
                own = {role: part[index] for role, part in parts.items()}
                self.decode(member(weight, index), own, out[index])
            return
        span = self._span(weight)
        assert span is not None
        rows, columns = weight.shape
        groups = -(-columns // span[1])
        scale = parts["scale"].reshape(-1, groups)
        if len(scale) != rows:
            scale = scale.repeat_interleave(span[0], 0)[:rows]
        zero = parts.get("zero_point")
        RearrangedCodes(
            layout="int8",
            bits=8,
            codes=parts["weight"],
            scale=scale,
            zero=None if zero is None else zero.reshape(rows, groups),
            group=max(span[1], 1),
        ).decode(out)

    def _layout_fault(self, weight: Weight) -> str | None:
        scale, zero = weight.parts["scale"], weight.parts.get("zero_point")
        span = self._span(weight)
        if span is None:
            return (
                f"scale {scale.name!r} has shape {list(scale.shape)}, which is neither by blocks of "
                f"{self.block}, by group, by channel nor for the tensor of {list(weight.shape)}"
            )
        if zero is None:
            return None
        rows, columns = weight.shape
        expected = (rows, -(-columns // span[1]))
        if zero.dtype == "I8" and (zero.shape == expected or zero.shape == (rows,) == scale.shape):
            return None
        return (
            f"zero point {zero.name!r} is {zero.dtype} {list(zero.shape)}, expected I8 "
            f"{list(expected)}"
        )

    def _span(self, weight: Weight) -> tuple[int, int] | None:
        """Rows and columns that share a scale; None: it fits no layout."""
        rows, columns = weight.shape
        scale = weight.parts["scale"].shape
        if scale in ((rows, 1), (rows,)):
            return (1, columns)
        if scale in ((), (1,), (1, 1)):
            return (rows, columns)
        if self.block is not None and scale == (
            -(-rows // self.block[0]),
            -(-columns // self.block[1]),
        ):
            return self.block
        by_group = len(scale) == _MATRIX and scale[0] == rows and scale[1] > 0
        return (1, columns // scale[1]) if by_group and columns % scale[1] == 0 else None
