"""Weights stored as the packed formats have them, with plain torch: nothing of this package.

Every quantiser takes a matrix [N, K] and gives the tensors that stand for it, by the part of their
name behind the module's, and the float32 values that they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Stored = dict[str, torch.Tensor]
Quantiser = Callable[[torch.Tensor], tuple[Stored, torch.Tensor]]

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GROUP = 32


@dataclass(frozen=True)
class Packing:
    """A format: how it stores a matrix, and what its publishers write into config.json."""

    quantise: Quantiser
    settings: dict[str, Any]


def spread(grid: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Scales by group of columns [N, G] for every element."""
    return grid.float().repeat_interleave(shape[1] // grid.shape[1], 1)


def pack_bytes(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes [N, K] as bytes [N, K/2], the low half first."""
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes [N, K] as I32 words, the lowest bits first, the last word filled with zeros."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % per_word))
    words = padded.view(len(codes), -1, per_word) << (torch.arange(per_word) * bits)
    return words.sum(dim=-1).to(torch.uint32).view(torch.int32)


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """The nearest codes."""
    magnitude = (values.abs()[..., None] - E2M1).abs().argmin(dim=-1)
    return magnitude | (torch.signbit(values).long() << 3)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    return torch.cat([E2M1, -E2M1])[codes.long()]


def group_max(matrix: torch.Tensor, group: int) -> torch.Tensor:
    return matrix.view(len(matrix), -1, group).abs().amax(dim=-1)


def packed_int(bits: int, group: int | None, *, zero: bool = False) -> Quantiser:
    """compressed-tensors' pack-quantized; `group` None: by channel."""
    middle = 1 << (bits - 1)

    def quantise(matrix: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        size = matrix.shape[1] if group is None else group
        scale = (group_max(matrix, size) / (middle - 1)).to(torch.bfloat16)
        offset = torch.full_like(scale, middle, dtype=torch.int64)
        if zero:
            generator = torch.Generator().manual_seed(matrix.shape[0])
            offset = torch.randint(0, 2 * middle, scale.shape, generator=generator)
        wide, point = spread(scale, matrix.shape), spread(offset, matrix.shape)
        codes = (matrix / wide + point).round().clamp(0, 2 * middle - 1)
        stored = {
            "weight_packed": pack_words(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(matrix.shape),
        }
        if zero:
            stored["weight_zero_point"] = pack_words(offset.T, bits).T.contiguous()
        return stored, (codes - point) * wide

    return quantise


def e8m0(matrix: torch.Tensor, group: int, largest: float) -> torch.Tensor:
    """Exponents plus 127 [N, K/group], uint8."""
    peak = group_max(matrix, group).clamp(min=1e-30)
    return (torch.ceil(torch.log2(peak / largest)) + 127).to(torch.uint8)


def mxfp4(codes_name: str, scale_name: str, *, tagged: bool) -> Quantiser:
    """MXFP4; `tagged`: with the dtypes of DeepSeek-V4."""

    def quantise(matrix: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        scale = e8m0(matrix, GROUP, 6.0)
        wide = 2.0 ** (spread(scale, matrix.shape) - 127)
        codes = e2m1_codes(matrix / wide)
        packed = pack_bytes(codes)
        stored = {
            codes_name: packed.view(torch.int8) if tagged else packed,
            scale_name: scale.view(torch.float8_e8m0fnu) if tagged else scale,
        }
        return stored, e2m1_values(codes) * wide

    return quantise


def mxfp8(matrix: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    scale = e8m0(matrix, GROUP, 448.0)
    wide = 2.0 ** (spread(scale, matrix.shape) - 127)
    codes = (matrix / wide).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * wide


def nvfp4(*, divisor: bool) -> Quantiser:
    """NVFP4 of compressed-tensors, or of ModelOpt, with the activation scale each writes beside."""

    def quantise(matrix: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        peaks = group_max(matrix, 16)
        whole = (peaks.max() / 6 / 448).float()
        factor = 1 / whole if divisor else whole
        scale = (peaks / 6 / whole).to(torch.float8_e4m3fn)
        meant = scale.float() / factor if divisor else scale.float() * factor
        wide = spread(meant, matrix.shape)
        codes = e2m1_codes(matrix / wide.clamp(min=1e-30))
        stored = {
            "weight_packed" if divisor else "weight": pack_bytes(codes),
            "weight_scale": scale,
        }
        if divisor:
            stored["weight_global_scale"] = factor.reshape(1)
            stored["input_global_scale"] = torch.tensor([100.0])
        else:
            stored["weight_scale_2"] = factor
            stored["input_scale"] = torch.tensor(0.01)
        return stored, e2m1_values(codes) * wide

    return quantise


def fp8_block(block: int, scale_dtype: torch.dtype, suffix: str) -> Quantiser:
    """E4M3 in blocks; E8M0 scales are rounded up to powers of two."""

    def quantise(matrix: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        rows, columns = matrix.shape
        pad = torch.nn.functional.pad(matrix, (0, -columns % block, 0, -rows % block))
        tiles = pad.view(pad.shape[0] // block, block, pad.shape[1] // block, block)
        scale = tiles.abs().amax(dim=(1, 3)) / 448
        if scale_dtype == torch.float8_e8m0fnu:
            scale = 2.0 ** torch.ceil(torch.log2(scale))
        scale = scale.to(scale_dtype)
        wide = scale.float().repeat_interleave(block, 0)[:rows]
        wide = wide.repeat_interleave(block, 1)[:, :columns]
        codes = (matrix / wide).to(torch.float8_e4m3fn)
        return {"weight": codes, suffix: scale}, codes.float() * wide

    return quantise


def compressed(packing: str, **weights: Any) -> dict[str, Any]:
    """Settings of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
PACKINGS = {
    "int4": Packing(packed_int(4, GROUP), compressed("pack-quantized", **INT4)),
    "int4-zero-points": Packing(
        packed_int(4, GROUP, zero=True), compressed("pack-quantized", **INT4, symmetric=False)
    ),
    "int8-channel": Packing(
        packed_int(8, None),
        compressed("pack-quantized", num_bits=8, type="int", strategy="channel"),
    ),
    "nvfp4": Packing(
        nvfp4(divisor=True),
        compressed(
            "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
        ),
    ),
    "nvfp4-modelopt": Packing(
        nvfp4(divisor=False), {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    ),
    "mxfp4": Packing(
        mxfp4("weight_packed", "weight_scale", tagged=False),
        compressed(
            "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=GROUP
        ),
    ),
    "mxfp4-deepseek": Packing(
        mxfp4("weight", "scale", tagged=True),
        {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [16, 16]},
    ),
    "mxfp8": Packing(mxfp8, {"quant_method": "modelopt", "quant_algo": "MXFP8"}),
    "fp8-block": Packing(
        fp8_block(24, torch.bfloat16, "weight_scale"),
        compressed(
            "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[24, 24]
        ),
    ),
    "fp8-e8m0": Packing(
        fp8_block(16, torch.float8_e8m0fnu, "scale"),
        {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [16, 16]},
    ),
}
