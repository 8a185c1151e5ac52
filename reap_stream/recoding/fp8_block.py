"""``--weights fp8``: E4M3 with a scale for each block of 128 × 128, as DeepSeek-V3 and Qwen3 publish.

``X.weight`` F8_E4M3 [N, K], ``X.weight_scale_inv`` F32 [ceil(N / 128), ceil(K / 128)].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from reap_stream.checkpoint.recipes import Bytes
from reap_stream.formats import Weight
from reap_stream.recoding.base import Part
from reap_stream.recoding.e4m3 import encode_e4m3

_BLOCK: Final = 128
_SUFFIX: Final = "_scale_inv"
_SCALE_DTYPES: Final = ("F32", "BF16")


class Fp8Block:
    """Block-scaled E4M3, quant_method ``fp8``."""

    name = "fp8"
    rows = _BLOCK
    exact = torch.float32

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """Codes and a scale a block."""
        rows, columns = shape
        grid = (-(-rows // _BLOCK), -(-columns // _BLOCK))
        return Part("", "F8_E4M3", (rows, columns)), Part(_SUFFIX, "F32", grid, rows=_BLOCK)

    def holds(self, weight: Weight) -> bool:
        """E4M3 with scales of that name, shape and a dtype that engines read."""
        scale = weight.parts.get("scale")
        if scale is None or len(weight.shape) != 2 or weight.format.name != "fp8":
            return False
        _, grid = self.parts(weight.shape)
        named = scale.name == weight.name + _SUFFIX
        return named and scale.shape == grid.shape and scale.dtype in _SCALE_DTYPES

    def encode(self, values: torch.Tensor, where: str) -> tuple[Bytes, ...]:
        """See `reap_stream.recoding.e4m3`; the scale of a block of zeros is 1, as transformers'."""
        return encode_e4m3(values, (_BLOCK, _BLOCK), 1.0, where)

    def quantization_config(self, ignored: Sequence[str]) -> dict[str, Any] | None:
        """As the published checkpoints have it."""
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": list(ignored),
            "quant_method": "fp8",
            "weight_block_size": [_BLOCK, _BLOCK],
        }
