"""Whole checkpoints in GPTQ, AWQ and INT8, as their publishers write them, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.builders import load_tensors, read_config, write_checkpoint
from tests.families import NUM_EXPERTS
from tests.words import pack_awq, pack_gptq

GROUP = 32
WIDTHS = {"hidden_size": 96, "moe_intermediate_size": 64, "intermediate_size": 128}
# MoE layers of the tiny models.
LAYERS = {"glm4_moe": (1, 2), "qwen3_moe": (0, 1, 2)}


def quantised_rows(
    weight: torch.Tensor, bits: int, group_of: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, K], zero points [N, G] and scales [N, G] that take each group's range."""
    groups = int(group_of.max()) + 1
    zeros = torch.from_numpy(rng.integers(0, 1 << bits, (len(weight), groups)))
    scale = torch.empty(len(weight), groups)
    for group in range(groups):
        scale[:, group] = weight[:, group_of == group].abs().amax(dim=1) / (1 << (bits - 1))
    scale = scale.half().float()
    wide, middle = scale[:, group_of], zeros[:, group_of]
    codes = ((weight / wide).round().long() + middle).clamp(0, (1 << bits) - 1)
    return codes, zeros, scale, (codes - middle) * wide


def store(
    kind: str, weight: torch.Tensor, rng: np.random.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a weight by their leaf, and the values they stand for."""
    columns = weight.shape[1]
    bits = 8 if kind == "gptq-8" else 4
    group_of = torch.arange(columns) // GROUP
    if kind == "gptq-order":
        group_of = group_of[torch.from_numpy(rng.permutation(columns))]
    if kind == "int8":
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        codes = (weight / scale).round().to(torch.int8)
        return {"weight": codes, "weight_scale": scale}, codes * scale
    codes, zeros, scale, values = quantised_rows(weight, bits, group_of, rng)
    if kind == "awq":
        return pack_awq(codes, zeros, scale.half()), values
    offset = 0 if kind == "gptq-v2" else 1
    return pack_gptq(codes, zeros, scale.half(), group_of.int(), bits, offset), values


def module_of(layer: int, expert: int, projection: str = "up_proj") -> str:
    """Name of an expert's projection."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}"


def settings_of(kind: str, layer: int) -> dict[str, Any]:
    """What the publishers of such checkpoints write, with entries that name experts."""
    named = [module_of(layer, expert) for expert in range(NUM_EXPERTS)]
    if kind == "awq":
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "modules_to_not_convert": ["mlp.gate", "lm_head", module_of(layer, 1)],
        }
    if kind == "int8":
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": {"targets": named, "weights": {"num_bits": 8}}},
            "ignore": ["lm_head", r"re:.*mlp\.gate$"],
        }
    return {
        "quant_method": "gptq",
        "bits": 8 if kind == "gptq-8" else 4,
        "group_size": GROUP,
        "desc_act": kind == "gptq-order",
        "sym": False,
        "checkpoint_format": "gptq_v2" if kind == "gptq-v2" else "gptq",
        "dynamic": {rf"+:{name.replace('.', chr(92) + '.')}$": {"bits": 4} for name in named},
    }


def expected_settings(
    settings: dict[str, Any], kept: Mapping[int, Sequence[int]], layer: int
) -> dict[str, Any]:
    """The settings after pruning, by replacing names in their text."""
    names = {module_of(layer, old): module_of(layer, new) for new, old in enumerate(kept[layer])}
    if settings["quant_method"] == "awq":
        lost = module_of(layer, 1)
        kept_names = [n for n in settings["modules_to_not_convert"] if n != lost]
        renamed = [names[lost]] if lost in names else []
        return {**settings, "modules_to_not_convert": kept_names + renamed}
    if settings["quant_method"] == "gptq":
        escaped = {old.replace(".", r"\."): new.replace(".", r"\.") for old, new in names.items()}
        dynamic = {
            key.replace(old, new): value
            for key, value in settings["dynamic"].items()
            for old, new in escaped.items()
            if old in key
        }
        return {**settings, "dynamic": dynamic}
    group = {**settings["config_groups"]["group_0"], "targets": list(names.values())}
    return {**settings, "config_groups": {"group_0": group}}


def quantise(source: Path, directory: Path, kind: str, layer: int) -> tuple[Path, Path]:
    """A checkpoint of that kind, all linears but router and lm_head, and what it means."""
    rng = np.random.default_rng(1)
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, tensor in load_tensors(source).items():
        # One projection stays as it is: layers of such checkpoints are seldom all alike.
        if not name.endswith("_proj.weight") or name.endswith("layers.0.self_attn.k_proj.weight"):
            stored[name] = meant[name] = tensor
            continue
        parts, meant[name] = store(kind, tensor.float(), rng)
        module = name.removesuffix(".weight")
        stored.update({f"{module}.{leaf}": part for leaf, part in parts.items()})
        if "experts" in name and kind != "int8":
            stored[f"{module}.input_scale"] = torch.tensor(float(len(stored)))
    config = read_config(source)
    settings = settings_of(kind, layer)
    made = write_checkpoint(directory / kind, stored, {**config, "quantization_config": settings})
    (made / "quantize_config.json").write_text(json.dumps(settings))
    return made, write_checkpoint(directory / "meant", meant, config)
