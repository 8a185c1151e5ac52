"""NVFP4: 4-bit floats E2M1, an E4M3 scale for each 16 of a row, and one scale for the tensor.

Layouts of a weight [N, K]:

* ``X.weight_packed`` U8 [N, K/2], ``X.weight_scale`` F8_E4M3 [N, K/16], ``X.weight_global_scale``
  F32 [1], by which scales are *divided*: compressed-tensors' ``nvfp4-pack-quantized``;
* ``X.weight`` U8 [N, K/2], ``X.weight_scale`` F8_E4M3 [N, K/16], ``X.weight_scale_2`` F32, by which
  they are *multiplied*: ModelOpt.

value = code × (scale of the 16 with the tensor's, rounded to float32), as both libraries compute it.
Scales of activations beside them (``input_scale``, ``input_global_scale``) do not change weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats.base import Weight
from reap_stream.formats.packed import PackedRows
from reap_stream.formats.scales import e4m3_values

GROUP: Final = 16
# Name of the codes → role and name of the tensor's own scale.
_KINDS: Final = {
    "weight_packed": ("divisor", "weight_global_scale"),
    "weight": ("multiplier", "weight_scale_2"),
}


class Nvfp4:
    """E2M1 matrices with E4M3 scales under one float scale."""

    name = "nvfp4"

    def claim(self, name: str, tensors: Mapping[str, TensorRef]) -> Weight | None:
        """Claims bytes beside an E4M3 scale."""
        ref = tensors[name]
        module, _, leaf = name.rpartition(".")
        scale = tensors.get(f"{module}.weight_scale")
        if leaf not in _KINDS or ref.dtype != "U8" or scale is None or scale.dtype != "F8_E4M3":
            return None
        role, companion = _KINDS[leaf]
        parts = {"codes": ref, "scale": scale}
        whole = tensors.get(f"{module}.{companion}")
        if whole is not None:
            parts[role] = whole
        shape = (*ref.shape[:-1], 2 * ref.shape[-1]) if ref.shape else ()
        return Weight(f"{module}.weight", shape, self, parts)

    def refusal(self, weight: Weight) -> str | None:
        """Refuses a missing scale of the tensor and shapes that do not go together."""
        codes, scale = weight.parts["codes"], weight.parts["scale"]
        role, companion = _KINDS[codes.name.rpartition(".")[2]]
        whole = weight.parts.get(role)
        if whole is None:
            module = weight.name.rpartition(".")[0]
            return f"4-bit tensor {codes.name!r} has no scale {module}.{companion}"
        if math.prod(whole.shape) != 1 or whole.dtype != "F32":
            return (
                f"scale {whole.name!r} is {whole.dtype} {list(whole.shape)}, expected F32 of one "
                "element"
            )
        expected = (weight.shape[0], weight.shape[-1] // GROUP) if weight.shape else ()
        if len(weight.shape) != 2 or weight.shape[1] % GROUP or scale.shape != expected:
            return (
                f"4-bit tensor {codes.name!r} {list(codes.shape)} with scale {scale.name!r} "
                f"{list(scale.shape)}: expected [rows, columns / 2] and [rows, columns / {GROUP}]"
            )
        return None

    def decode(self, weight: Weight, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Multiplies codes by both scales."""
        del weight
        table = e4m3_values().to(out.device)
        if "divisor" in parts:
            table = table / parts["divisor"].reshape(())
        else:
            table = table * parts["multiplier"].reshape(())
        PackedRows(
            code="e2m1",
            codes=parts["codes"],
            scale=parts["scale"],
            group=GROUP,
            table=table.contiguous(),
        ).decode(out)
