"""FP8 (E4M3) weights with float scales: by blocks, by output channel, or one for the tensor.

Layouts (vLLM and compressed-tensors agree on all of them), for a weight [N, K]:

* ``X_scale_inv`` [ceil(N/bn), ceil(K/bk)]: blocks, DeepSeek-V3's scheme (quant_method ``fp8``);
* ``X_scale`` [N, 1] or [N]: one scale for each output channel (``float-quantized``);
* ``X_scale`` of one element: one scale for the tensor.

value = E4M3 code × scale, in float32, rounded once to the compute dtype. Despite its name
``scale_inv`` is multiplied, as in DeepSeek's own kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from reap_stream import _native
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats.base import Weight

DEFAULT_BLOCK = (128, 128)
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
_SCALE_DTYPES = ("F32", "BF16", "F16")


class Fp8:
    """E4M3 weights of two dimensions with their scales."""

    name = "fp8"

    def __init__(self, block: tuple[int, int] = DEFAULT_BLOCK) -> None:
        """`block`: rows and columns of a block, `weight_block_size` of the config."""
        self.block = block

    def claim(self, name: str, tensors: Mapping[str, TensorRef]) -> Weight | None:
        """Claims E4M3 tensors, together with the scale that lies beside them."""
        ref = tensors[name]
        if ref.dtype != "F8_E4M3" or name.endswith(_SCALE_SUFFIXES):
            return None
        parts = {"weight": ref}
        for suffix in _SCALE_SUFFIXES:
            if name + suffix in tensors:
                parts["scale"] = tensors[name + suffix]
                break
        return Weight(name, ref.shape, self, parts)

    def refusal(self, weight: Weight) -> str | None:
        """Refuses a missing scale, a scale that fits no layout, and fused (3-D) weights."""
        scale = weight.parts.get("scale")
        if scale is None:
            return (
                f"FP8 tensor {weight.name!r} has no scale ({weight.name}_scale_inv or "
                f"{weight.name}_scale): its values cannot be known"
            )
        if len(weight.shape) != 2:
            return f"FP8 tensor {weight.name!r} has {len(weight.shape)} dimensions, expected 2"
        if scale.dtype not in _SCALE_DTYPES:
            return f"scale {scale.name!r} has dtype {scale.dtype}, expected one of {_SCALE_DTYPES}"
        if self.scaled_block(weight) is None:
            return (
                f"scale {scale.name!r} has shape {list(scale.shape)}, which is neither by blocks "
                f"of {list(self.block)}, by channel nor for the tensor of {list(weight.shape)}"
            )
        return None

    def scaled_block(self, weight: Weight) -> tuple[int, int] | None:
        """Rows and columns that share one scale, or None when the scale fits no known layout."""
        rows, columns = weight.shape
        shape = weight.parts["scale"].shape
        blocks = (-(-rows // self.block[0]), -(-columns // self.block[1]))
        by_channel, by_tensor = shape in ((rows, 1), (rows,)), shape in ((), (1,), (1, 1))
        if shape == blocks and weight.parts["scale"].name.endswith("_inv"):
            return self.block
        if by_channel:
            return (1, columns)
        if by_tensor:
            return (rows, columns)
        return self.block if shape == blocks else None

    def decode(self, weight: Weight, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Multiplies codes by their scales: the extension on the CPU, torch elsewhere."""
        block = self.scaled_block(weight)
        assert block is not None
        rows, columns = weight.shape
        scale = parts["scale"].to(torch.float32).reshape(-(-rows // block[0]), -1).contiguous()
        codes = parts["weight"].view(weight.shape)
        if out.device.type != "cpu" or out.dtype == torch.float16 or not out.is_contiguous():
            out.copy_(codes.to(torch.float32) * _spread(scale, block, rows, columns))
            return
        tag: Literal["bf16", "f32"] = "bf16" if out.dtype == torch.bfloat16 else "f32"
        _native.fp8_decode(
            codes.view(torch.uint8).numpy(),
            scale.numpy(),
            out.view(torch.uint8).numpy(),
            rows,
            columns,
            *block,
            tag,
            threads=torch.get_num_threads(),
        )


def _spread(scale: torch.Tensor, block: tuple[int, int], rows: int, columns: int) -> torch.Tensor:
    """Scales by block [.., ..] laid out so that they multiply a matrix [rows, columns]."""
    if scale.shape[0] not in (1, rows):
        scale = scale.repeat_interleave(block[0], 0)[:rows]
    if scale.shape[1] not in (1, columns):
        scale = scale.repeat_interleave(block[1], 1)[:, :columns]
    return scale
