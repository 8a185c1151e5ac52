"""Scales stored in a byte, and the tables that give each byte its value.

* E8M0 (OCP Microscaling formats, section 5.4.1): 2 to the power of the byte less 127; 255 is NaN.
  Safetensors tags it F8_E8M0; compressed-tensors, ModelOpt and gpt-oss store it as U8.
* E4M3: scales of NVFP4, under one scale for the tensor.
"""

from __future__ import annotations

from functools import cache

import torch

E8M0_DTYPES = ("F8_E8M0", "U8")


@cache
def e8m0_values() -> torch.Tensor:
    """What each byte means as E8M0, float32 [256]; not to be written to."""
    values = torch.arange(256, dtype=torch.int32) << 23
    # 2^-127 is no normal number of float32: half of the smallest one, by its bits.
    values[0] = 1 << 22
    meant = values.view(torch.float32).clone()
    meant[255] = torch.nan
    return meant


@cache
def e4m3_values() -> torch.Tensor:
    """What each byte means as E4M3, float32 [256]; not to be written to."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)


def looked_up(scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Bytes of any one-byte dtype through a table float32 [256]: float32 of their shape."""
    return table.to(scale.device)[scale.contiguous().view(torch.uint8).long()]


def float_scale(scale: torch.Tensor) -> torch.Tensor:
    """Scales as float32: E8M0 bytes by their meaning, others by a cast."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return looked_up(scale, e8m0_values())
    return scale.to(torch.float32)
