"""All experts of a layer as MXFP4 in one tensor: gpt-oss as OpenAI publishes it.

Layout of `experts.gate_up_proj` and `experts.down_proj` [E, K, N], E experts:

* ``…_blocks`` U8 [E, N, K/32, 16]: 16 bytes of two codes each;
* ``…_scales`` U8 [E, N, K/32]: E8M0;
* ``…_bias`` [E, N]: a plain tensor of its own.

On disk a row is one output channel; the parameter has the output channels last, so values come out
transposed, as transformers' own `convert_moe_packed_tensors` has them. (It gives an infinite scale
to the byte 255, which the standard says is NaN and no published checkpoint has.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats.base import Weight
from reap_stream.formats.mxfp4 import GROUP, decode_e2m1
from reap_stream.formats.scales import E8M0_DTYPES

_BLOCKS: Final = "_blocks"
_BLOCK_NBYTES: Final = GROUP // 2
_MIN_DIMENSIONS: Final = 3


class Mxfp4Experts:
    """E2M1 blocks of all experts, stored by output channel."""

    name = "mxfp4-experts"

    def claim(self, name: str, tensors: Mapping[str, TensorRef]) -> Weight | None:
        """Claims `X_blocks` together with `X_scales`."""
        ref = tensors[name]
        stem = name.removesuffix(_BLOCKS)
        if stem == name or ref.dtype != "U8" or len(ref.shape) < _MIN_DIMENSIONS:
            return None
        scales = tensors.get(f"{stem}_scales")
        parts = {"codes": ref} if scales is None else {"codes": ref, "scale": scales}
        *outer, channels, blocks, nbytes = ref.shape
        return Weight(stem, (*outer, blocks * nbytes * 2, channels), self, parts, transposed=True)

    def refusal(self, weight: Weight) -> str | None:
        """Refuses missing scales and shapes that do not go together."""
        codes, scale = weight.parts["codes"], weight.parts.get("scale")
        if scale is None:
            return f"4-bit tensor {codes.name!r} has no scales ({weight.name}_scales)"
        fits = codes.shape[-1] == _BLOCK_NBYTES and scale.shape == codes.shape[:-1]
        if not fits or scale.dtype not in E8M0_DTYPES:
            return (
                f"4-bit tensor {codes.name!r} {list(codes.shape)} with scales {scale.name!r} "
                f"{scale.dtype} {list(scale.shape)}: expected [.., {_BLOCK_NBYTES}] and U8 "
                f"{list(codes.shape[:-1])}"
            )
        return None

    def decode(self, weight: Weight, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Multiplies codes by their scales, one row of `out` transposed for each output channel."""
        del weight
        codes, scale = parts["codes"], parts["scale"]
        by_channel = out.transpose(-1, -2)
        rows = math.prod(scale.shape[:-1])
        target = by_channel
        if not by_channel.is_contiguous():
            target = torch.empty(by_channel.shape, dtype=out.dtype, device=out.device)
        decode_e2m1(
            codes.reshape(rows, -1),
            scale.reshape(rows, -1),
            target.view(rows, by_channel.shape[-1]),
        )
        if target is not by_channel:
            by_channel.copy_(target)
