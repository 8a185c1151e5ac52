"""FP8 of whole matrices by plain torch, and whole checkpoints written and read by it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch

SUFFIXES = {"fp8": "_scale_inv", "fp8-channel": "_scale"}


def formula(
    values: torch.Tensor, block: tuple[int, int], of_zeros: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and the scale of each block."""
    values = values.float()
    rows, columns = values.shape
    (high, wide), grid = block, (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    whole = torch.zeros(grid[0] * high, grid[1] * wide)
    whole[:rows, :columns] = values
    blocks = whole.view(grid[0], high, grid[1], wide)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    # Of numbers next to zero, too, the quotient is zero.
    scale = torch.where(scale > 0, scale, of_zeros)
    codes = (blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.reshape(whole.shape)[:rows, :columns].contiguous(), scale.reshape(grid)


def encoded(
    tensors: Mapping[str, torch.Tensor], mode: str, wanted: Callable[[str], object]
) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors with those that are wanted as FP8."""
    found = {}
    for name, tensor in tensors.items():
        if not wanted(name):
            found[name] = tensor
            continue
        block = (128, 128) if mode == "fp8" else (1, tensor.shape[1])
        codes, scale = formula(tensor, block, 1.0 if mode == "fp8" else 2.0**-23)
        found[name], found[name + SUFFIXES[mode]] = codes, scale
    return found


def meant(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 values that a checkpoint with FP8 weights stands for."""
    found = {}
    for name, tensor in tensors.items():
        if re.search(r"weight_scale(_inv)?$", name):
            continue
        scale = next((tensors[name + s] for s in SUFFIXES.values() if name + s in tensors), None)
        values = tensor.float() if tensor.is_floating_point() else tensor
        if scale is not None:
            rows, columns = tensor.shape
            high = 128 if name + "_scale_inv" in tensors else 1
            wide = 128 if high > 1 else columns
            grown = scale.float().repeat_interleave(high, 0).repeat_interleave(wide, 1)
            values = values * grown[:rows, :columns]
        found[name] = values
    return found
