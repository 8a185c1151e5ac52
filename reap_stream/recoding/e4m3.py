"""From numbers to E4M3 codes and scales, by the extension.

    scale = largest absolute value / 448            in float32, 448 being E4M3's largest number
    code  = E4M3(value / scale)                     to nearest even, saturating

The formula of DeepSeek-V3's published conversion and of compressed-tensors on float32 tensors,
bit for bit. transformers' own quantiser multiplies by 448 / largest instead and stores the
inverse of that, so its scales may differ by two units in the last place.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import torch

from reap_stream import _native
from reap_stream.checkpoint.recipes import Bytes
from reap_stream.errors import OutputError

LARGEST: Final = np.float32(448)


def encode_e4m3(
    values: torch.Tensor, block: tuple[int, int], of_zeros: float, where: str
) -> tuple[Bytes, Bytes]:
    """Codes and scales of a matrix.

    Args:
        values: [rows, columns], contiguous, on the CPU, floating.
        block: rows and columns that share a scale.
        of_zeros: the scale where all values are zero, or so small that theirs would be.
        where: file and tensor, for messages.

    Returns:
        uint8 bytes of the codes [rows, columns] and of the float32 scales, a scale a block.

    Raises:
        OutputError: a value is infinite or not a number.
    """
    rows, columns = values.shape
    if values.dtype not in (torch.bfloat16, torch.float32):
        values = values.to(torch.float32)
    tag: Literal["bf16", "f32"] = "bf16" if values.dtype == torch.bfloat16 else "f32"
    raw = values.contiguous().view(torch.uint8).numpy()
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    scale = np.empty(grid, dtype=np.float32)
    _native.block_absmax(raw, tag, scale, rows, columns, *block)
    if not np.isfinite(scale).all():
        message = f"{where} holds values that are infinite or not numbers: FP8 cannot store them"
        raise OutputError(message)
    scale /= LARGEST
    scale[scale == 0] = of_zeros
    codes = np.empty(rows * columns, dtype=np.uint8)
    _native.fp8_encode(raw, tag, scale, codes, rows, columns, *block)
    return codes, scale.reshape(-1).view(np.uint8)
