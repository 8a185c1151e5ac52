"""FP8 (E4M3) weights with their scales: by blocks, by groups of a row, by channel, or one for all.

Layouts (vLLM and compressed-tensors agree on all of them), for a weight [N, K]:

* ``X_scale_inv`` [ceil(N/bn), ceil(K/bk)]: blocks, DeepSeek-V3's scheme (quant_method ``fp8``);
* ``X_scale`` of the same shape: blocks of compressed-tensors;
* ``X_scale`` [N, G]: G groups of each row (MXFP8: one for each 32 columns);
* ``X_scale`` [N, 1] or [N]: one scale for each output channel (``float-quantized``);
* ``X_scale`` of one element: one scale for the tensor.

DeepSeek-V4 has ``Y.scale`` beside ``Y.weight``. Scales are floats, or E8M0: bytes that stand for
powers of two, tagged F8_E8M0 or U8. All this goes for experts that lie in one tensor [E, N, K] too,
their scales having E in front.

value = E4M3 code × scale, in float32, rounded once to the compute dtype. Despite its name
``scale_inv`` is multiplied, as in DeepSeek's own kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import torch

from reap_stream import _native
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats.base import Weight, member
from reap_stream.formats.scales import E8M0_DTYPES, float_scale

DEFAULT_BLOCK = (128, 128)
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
_SCALE_DTYPES = ("F32", "BF16", "F16", *E8M0_DTYPES)
_MATRIX: Final = 2
_STACK: Final = 3


class Fp8:
    """E4M3 matrices with their scales.

    Args:
        blocks: rows and columns of a block, as the config names them; of several the first that
            fits a scale's shape holds.
    """

    name = "fp8"

    def __init__(self, *blocks: tuple[int, int]) -> None:
        self.blocks: Sequence[tuple[int, int]] = blocks or (DEFAULT_BLOCK,)

    @property
    def block(self) -> tuple[int, int]:
        """The first of the config's blocks."""
        return self.blocks[0]

    def claim(self, name: str, tensors: Mapping[str, TensorRef]) -> Weight | None:
        """Claims E4M3 tensors, together with the scale that lies beside them."""
        ref = tensors[name]
        if ref.dtype != "F8_E4M3" or name.endswith(_SCALE_SUFFIXES):
            return None
        parts = {"weight": ref}
        names = [name + suffix for suffix in _SCALE_SUFFIXES]
        if name.endswith(".weight"):
            names.append(name.removesuffix("weight") + "scale")
        scale = next((tensors[n] for n in names if n in tensors), None)
        if scale is not None:
            parts["scale"] = scale
        return Weight(name, ref.shape, self, parts)

    def refusal(self, weight: Weight) -> str | None:
        """Refuses a missing scale and a scale that fits no layout."""
        scale = weight.parts.get("scale")
        if scale is None:
            return (
                f"FP8 tensor {weight.name!r} has no scale ({weight.name}_scale_inv or "
                f"{weight.name}_scale): its values cannot be known"
            )
        if len(weight.shape) not in (_MATRIX, _STACK):
            return f"FP8 tensor {weight.name!r} has {len(weight.shape)} dimensions, expected 2 or 3"
        if scale.dtype not in _SCALE_DTYPES:
            return f"scale {scale.name!r} has dtype {scale.dtype}, expected one of {_SCALE_DTYPES}"
        stacked = len(weight.shape) == _STACK
        if stacked and scale.shape[:1] != weight.shape[:1]:
            return (
                f"scale {scale.name!r} has shape {list(scale.shape)}, expected {weight.shape[0]} "
                f"experts in front as {weight.name!r} {list(weight.shape)} has"
            )
        if self.scaled_block(member(weight, 0) if stacked else weight) is None:
            blocks = " or ".join(str(list(block)) for block in self.blocks)
            return (
                f"scale {scale.name!r} has shape {list(scale.shape)}, which is neither by blocks "
                f"of {blocks}, by group, by channel nor for the tensor of {list(weight.shape)}"
            )
        return None

    def scaled_block(self, weight: Weight) -> tuple[int, int] | None:
        """Rows and columns of a matrix that share one scale; None: the scale fits no layout."""
        rows, columns = weight.shape
        scale = weight.parts["scale"]
        by_block = next((b for b in self.blocks if scale.shape == _grid(weight.shape, b)), None)
        if by_block is not None and scale.name.endswith("_inv"):
            return by_block
        if scale.shape in ((rows, 1), (rows,)):
            return (1, columns)
        if scale.shape in ((), (1,), (1, 1)):
            return (rows, columns)
        by_group = len(scale.shape) == _MATRIX and scale.shape[0] == rows
        if by_block is None and by_group and columns % max(scale.shape[1], 1) == 0:
            return (1, columns // max(scale.shape[1], 1))
        return by_block

    def decode(self, weight: Weight, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Multiplies codes by their scales: the extension on the CPU, torch elsewhere."""
        if len(weight.shape) == _STACK:
            for index in range(weight.shape[0]):
                own = {role: tensor[index] for role, tensor in parts.items()}
                self.decode(member(weight, index), own, out[index])
            return
        block = self.scaled_block(weight)
        assert block is not None
        rows, columns = weight.shape
        scale = float_scale(parts["scale"]).reshape(-(-rows // block[0]), -1).contiguous()
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


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def _spread(scale: torch.Tensor, block: tuple[int, int], rows: int, columns: int) -> torch.Tensor:
    """Scales by block [.., ..] laid out so that they multiply a matrix [rows, columns]."""
    if scale.shape[0] not in (1, rows):
        scale = scale.repeat_interleave(block[0], 0)[:rows]
    if scale.shape[1] not in (1, columns):
        scale = scale.repeat_interleave(block[1], 1)[:, :columns]
    return scale
