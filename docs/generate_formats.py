"""Writes the examples of docs/formats.md: one matrix in every format that is read.

python docs/generate_formats.py

The matrices are quantised by the tests' own quantisers and claimed by the package's formats. The part
of the page between `<!-- examples: begin` and `<!-- examples: end -->` is made anew.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from reap_stream.formats import TORCH_DTYPES, group_weights, known_formats
from tests.packed_weights import decoded, fused_mxfp4, refs_of, weight_of
from tests.quantisers import PACKINGS, Quantiser, Stored, fp8_block
from tests.word_checkpoints import settings_of, store

PAGE: Final = Path(__file__).resolve().parent / "formats.md"
ROWS, COLUMNS, EXPERTS = 512, 1024, 8
_TAGS: Final = {dtype: tag for tag, dtype in TORCH_DTYPES.items()}
_SECTION: Final = r"(<!-- examples: begin[^>]*-->\n)(.*?)(<!-- examples: end -->)"
_BLOCKS: Final = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def _fp8(dim: int | None) -> Quantiser:
    """E4M3 with one scale for each output channel, or for the tensor."""

    def quantise(matrix: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        largest = matrix.abs().amax(dim=dim, keepdim=True) if dim else matrix.abs().max()
        scale = (largest / 448).float()
        codes = (matrix / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale

    return quantise


def _words(kind: str) -> Quantiser:
    return lambda matrix: store(kind, matrix, np.random.default_rng(0))


def _plain(matrix: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    rounded = matrix.to(torch.bfloat16)
    return {"weight": rounded}, rounded.float()


def _packed(name: str) -> tuple[Quantiser, Mapping[str, Any]]:
    return PACKINGS[name].quantise, PACKINGS[name].settings


# What it is called, how it is made, what config.json says of it.
_EXAMPLES: Final[Mapping[str, tuple[Quantiser, Mapping[str, Any]]]] = {
    "BF16": (_plain, {}),
    "FP8, blocks of 128 × 128": (fp8_block(128, torch.float32, "weight_scale_inv"), _BLOCKS),
    "FP8, by output channel": (_fp8(1), {"quant_method": "compressed-tensors"}),
    "FP8, one scale": (_fp8(None), {"quant_method": "fp8"}),
    "MXFP8": _packed("mxfp8"),
    "INT8, by output channel": (_words("int8"), settings_of("int8", 0)),
    "INT8 in words, by output channel": _packed("int8-channel"),
    "INT4, groups of 32": _packed("int4"),
    "INT4, groups of 32, zero points": _packed("int4-zero-points"),
    "GPTQ, 4 bits, groups of 32": (_words("gptq"), settings_of("gptq", 0)),
    "AWQ, groups of 32": (_words("awq"), settings_of("awq", 0)),
    "NVFP4, compressed-tensors": _packed("nvfp4"),
    "NVFP4, ModelOpt": _packed("nvfp4-modelopt"),
    "MXFP4, compressed-tensors": _packed("mxfp4"),
    "MXFP4, DeepSeek-V4": _packed("mxfp4-deepseek"),
}


def examples() -> str:
    """The table."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(ROWS, COLUMNS, generator=generator) * 0.1
    lines = [_row(label, *parts, matrix) for label, parts in _EXAMPLES.items()]
    fused = fused_mxfp4(EXPERTS, ROWS, COLUMNS)
    lines.append(_line(f"MXFP4, gpt-oss, {EXPERTS} experts", fused, _fused_name(fused)))
    head = (
        "| one matrix | tensors, by their names behind the module's | bits a value | `inspect` |\n"
    )
    return head + "|---|---|---|---|\n" + "".join(lines)


def formats_page(page: str) -> str:
    """The page with its examples made anew."""
    return re.sub(_SECTION, rf"\1\n{examples()}\n\3", page, flags=re.DOTALL)


def _row(label: str, quantise: Quantiser, settings: Mapping[str, Any], matrix: torch.Tensor) -> str:
    stored, meant = quantise(matrix)
    weight = weight_of(stored, dict(settings) or None)
    torch.testing.assert_close(decoded(weight, stored, torch.float32), meant)
    return _line(label, stored, weight.format.name)


def _fused_name(stored: Stored) -> str:
    """What the format is called of a tensor that holds all experts."""
    named = refs_of({f"m.{part}": tensor for part, tensor in stored.items()})
    return group_weights(named, known_formats({}))["m.gate_up_proj"].format.name


def _line(label: str, stored: Stored, name: str) -> str:
    parts = ", ".join(
        f"`{part}` {_TAGS[tensor.dtype]} {list(tensor.shape)}" for part, tensor in stored.items()
    )
    values = ROWS * COLUMNS * (EXPERTS if "experts" in label else 1)
    bits = 8 * sum(tensor.nbytes for tensor in stored.values()) / values
    return f"| {label} | {parts} | {bits:.2f} | `{name}` |\n"


if __name__ == "__main__":
    PAGE.write_text(formats_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE.name} written\n")
