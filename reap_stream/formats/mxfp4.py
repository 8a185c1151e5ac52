"""MXFP4 (OCP Microscaling formats): 4-bit floats E2M1 under one E8M0 scale for each 32 of a row.

Layouts of a weight [N, K]:

* ``X.weight_packed`` U8 [N, K/2] and ``X.weight_scale`` [N, K/32]: compressed-tensors'
  ``mxfp4-pack-quantized``;
* ``X.weight`` U8 or I8 [N, K/2] and ``X.weight_scale`` or ``X.scale`` [N, K/32]: quant_method
  ``mxfp4``, and the experts of DeepSeek-V4.

Of two codes in a byte the low half comes first. A product of code and scale is exact in bfloat16
and float32, short of their largest and smallest numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats.base import Weight
from reap_stream.formats.packed import PackedRows
from reap_stream.formats.scales import E8M0_DTYPES, e8m0_values

GROUP: Final = 32
_SCALES: Final = ("weight_scale", "scale", "weight_scale_inv")


class Mxfp4:
    """E2M1 matrices with E8M0 scales."""

    name = "mxfp4"

    def claim(self, name: str, tensors: Mapping[str, TensorRef]) -> Weight | None:
        """Claims bytes beside an E8M0 scale, and U8 `weight_packed` that nothing else claimed."""
        ref = tensors[name]
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "weight_packed") or ref.dtype not in ("U8", "I8"):
            return None
        found = (tensors.get(f"{module}.{scale}") for scale in _SCALES)
        scale = next((s for s in found if s is not None and s.dtype in E8M0_DTYPES), None)
        if scale is None and leaf == "weight":
            return None
        parts = {"codes": ref} if scale is None else {"codes": ref, "scale": scale}
        shape = (*ref.shape[:-1], 2 * ref.shape[-1]) if ref.shape else ()
        return Weight(f"{module}.weight", shape, self, parts)

    def refusal(self, weight: Weight) -> str | None:
        """Refuses a missing scale and shapes that do not go together."""
        codes, scale = weight.parts["codes"], weight.parts.get("scale")
        if scale is None:
            return f"4-bit tensor {codes.name!r} has no scale ({weight.name}_scale) of a known kind"
        expected = (weight.shape[0], weight.shape[-1] // GROUP) if weight.shape else ()
        if len(weight.shape) != 2 or weight.shape[1] % GROUP or scale.shape != expected:
            return (
                f"4-bit tensor {codes.name!r} {list(codes.shape)} with scale {scale.name!r} "
                f"{list(scale.shape)}: expected [rows, columns / 2] and [rows, columns / {GROUP}]"
            )
        return None

    def decode(self, weight: Weight, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Multiplies codes by their scales."""
        del weight
        decode_e2m1(parts["codes"], parts["scale"], out)


def decode_e2m1(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the values of E2M1 codes under E8M0 scales.

    Args:
        codes: bytes [rows, columns / 2].
        scale: bytes [rows, columns / 32].
        out: [rows, columns].
    """
    PackedRows(
        code="e2m1", codes=codes.view(torch.uint8), scale=scale, group=GROUP, table=e8m0_values()
    ).decode(out)
