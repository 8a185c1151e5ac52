"""Weights stored as the numbers they are: one tensor of a dtype torch computes with."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats.base import Weight

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PLAIN = frozenset(TORCH_DTYPES) - {"F8_E4M3", "F8_E8M0"}


class Plain:
    """bfloat16, float16, float32 and the integer types of buffers."""

    name = "plain"

    def claim(self, name: str, tensors: Mapping[str, TensorRef]) -> Weight | None:
        """Claims every tensor of a plain dtype."""
        ref = tensors[name]
        return Weight(name, ref.shape, self, {"weight": ref}) if ref.dtype in _PLAIN else None

    def refusal(self, weight: Weight) -> str | None:
        """Plain weights can always be read."""
        del weight
        return None

    def decode(self, weight: Weight, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Copies the values, cast to the dtype of `out`."""
        out.copy_(parts["weight"].view(weight.shape))
