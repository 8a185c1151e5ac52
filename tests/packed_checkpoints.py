"""Checkpoints whose linear layers are packed, and what they mean in float32."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from tests.builders import load_tensors, read_config, write_checkpoint
from tests.quantisers import E2M1, PACKINGS, e2m1_values, e8m0

# Groups of 32 columns must fit all that is quantised.
WIDTHS = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96}
_LINEAR = re.compile(r"_proj(?:_with_mqa)?\.weight$")
_EXPERT = re.compile(r"\.experts\.\d+\.")

Choice = Callable[[str], "str | None"]


def everywhere(packing: str) -> Choice:
    """Every linear layer whose columns groups of 32 divide."""
    return lambda name: packing if _LINEAR.search(name) else None


def experts_only(packing: str) -> Choice:
    """Routed experts, as Kimi-K2-Thinking has them."""
    return lambda name: packing if _EXPERT.search(name) else None


def head_only(packing: str) -> Choice:
    """The output head's matrix alone."""
    return lambda name: packing if name == "lm_head.weight" else None


def mixed(experts: str, rest: str, plain_layer: int) -> Choice:
    """One format for experts, another for other linear layers, one layer as it was."""

    def choose(name: str) -> str | None:
        if f".layers.{plain_layer}." in name or not _LINEAR.search(name):
            return None
        return experts if _EXPERT.search(name) else rest

    return choose


def pack(source: Path, directory: Path, choose: Choice) -> tuple[Path, Path]:
    """Stores the chosen weights packed and all else as bfloat16.

    Returns:
        The packed checkpoint, and a float32 one of the values it stands for.
    """
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    used: dict[str, None] = {}
    for name, tensor in load_tensors(source).items():
        packing = choose(name)
        if packing is None or tensor.shape[-1] % 32:
            stored[name] = tensor.to(torch.bfloat16)
            meant[name] = stored[name].float()
            continue
        used[packing] = None
        parts, meant[name] = PACKINGS[packing].quantise(tensor)
        module = name.removesuffix("weight")
        stored.update({module + suffix: part for suffix, part in parts.items()})
    config = read_config(source)
    return (
        write_checkpoint(directory / "packed", stored, {**config, **_settings(list(used))}),
        write_checkpoint(directory / "meant", meant, config),
    )


def _settings(packings: list[str]) -> dict[str, object]:
    """The quantisation settings of a checkpoint of these formats."""
    settings = [PACKINGS[packing].settings for packing in packings]
    if all(own == settings[0] for own in settings):
        return {"quantization_config": settings[0]}
    groups = {
        f"group_{number}": {**own["config_groups"]["group_0"], "format": own["format"]}
        for number, own in enumerate(settings)
    }
    return {
        "quantization_config": {**settings[0], "format": "mixed-precision", "config_groups": groups}
    }


def pack_gpt_oss(source: Path, directory: Path) -> tuple[Path, Path]:
    """The experts of a gpt-oss checkpoint as OpenAI publishes them."""
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, tensor in load_tensors(source).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = tensor.to(torch.bfloat16)
            meant[name] = stored[name].float()
            continue
        rows = tensor.transpose(1, 2).contiguous()
        flat = rows.view(-1, rows.shape[-1])
        scale = e8m0(flat, 32, float(E2M1[-1]))
        wide = 2.0 ** (scale.float() - 127).repeat_interleave(32, 1)
        signed = flat / wide
        codes = (signed.abs()[..., None] - E2M1).abs().argmin(-1) | (torch.signbit(signed) * 8)
        blocks = (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8)
        experts, channels, columns = rows.shape
        stored[f"{name}_blocks"] = blocks.view(experts, channels, columns // 32, 16)
        stored[f"{name}_scales"] = scale.view(experts, channels, columns // 32)
        values = (e2m1_values(codes) * wide).view(rows.shape)
        meant[name] = values.transpose(1, 2).contiguous()
    config = read_config(source)
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return (
        write_checkpoint(directory / "packed", stored, {**config, "quantization_config": settings}),
        write_checkpoint(directory / "meant", meant, config),
    )
