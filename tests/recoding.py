"""What tests of checkpoints in another weight format share: families, and which tensors change."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.builders import load_tensors, tiny_model
from tests.families import BY_ID

KEEP = 4
# Wide enough for FP8, and no multiple of 128 where it need not be.
WIDTHS = {
    "hidden_size": 256,
    "head_dim": 64,
    "moe_intermediate_size": 136,
    "intermediate_size": 200,
    "shared_expert_intermediate_size": 152,
}
MLA_WIDTHS = {
    "head_dim": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
GATED_DELTA = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
EXPERTS = r"\.experts\.\d+\.\w+\.weight$"
ATTENTION = r"self_attn\.[qkvo]_proj\.weight$"
MLP = r"mlp\.(shared_experts?\.)?(gate|up|down)_proj\.weight$"
# Family → further widths and the names of what its published FP8 checkpoints quantise.
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "glm4_moe": ({}, [EXPERTS, ATTENTION, MLP]),
    "deepseek_v3": (
        MLA_WIDTHS,
        [EXPERTS, MLP, r"self_attn\.(q_[ab]|kv_b|o)_proj\.weight$", r"kv_a_proj_with_mqa\.weight$"],
    ),
    "qwen3_next": (
        GATED_DELTA,
        [EXPERTS, ATTENTION, MLP, r"linear_attn\.(in_proj_qkvz|out_proj)\.weight$"],
    ),
    "mixtral": ({}, [EXPERTS, ATTENTION]),
}
MODES = ["fp8", "fp8-channel"]


def wide_model(family_id: str, dtype: torch.dtype) -> Any:
    """A model of a family, wide enough to be quantised."""
    model = tiny_model(BY_ID[family_id], **{**WIDTHS, **FAMILIES[family_id][0]})
    return model.to(dtype)


def is_quantised(family_id: str) -> Callable[[str], object]:
    """Whether a tensor is one of those that the family's published FP8 checkpoints quantise."""
    return re.compile("|".join(FAMILIES[family_id][1])).search


def assert_tensors(output: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """The tensors of a checkpoint, bit for bit."""
    found = load_tensors(output)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        mine, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(mine, theirs), name


def record(output: Path) -> dict[str, Any]:
    """run.json."""
    document: dict[str, Any] = json.loads((output / "reap" / "run.json").read_bytes())
    return document


def as_bfloat16(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices but routers, rounded."""
    keep = re.compile(r"norm|bias|mlp\.gate\.weight|conv|A_log|dt_")
    return {n: t if keep.search(n) else t.to(torch.bfloat16) for n, t in tensors.items()}
