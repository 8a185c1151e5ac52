"""A model pruned by hand: what of its tensors stays, and that their bytes are the source's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.builders import load_tensors
from tests.families import NUM_EXPERTS

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
LAYER = re.compile(r"\.(?:layers|blocks)\.(\d+)\.")
# Parts of vision-language and omni models that text does not run through.
OTHERS = re.compile(r"\.(?:\w*visi?on\w*|visual|\w*audio\w*|talker|code2wav|vit|towers?)\.")


def best(scores: np.ndarray[Any, Any], keep: int, groups: int) -> list[int]:
    """The highest scores, in each group as many, of equal ones the lower index."""
    size = len(scores) // groups
    kept: list[int] = []
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        kept += sorted(members, key=lambda j: (-scores[j], j))[: keep // groups]
    return sorted(kept)


def prune_by_hand(model: Any, smaller: Any, kept: Mapping[int, Sequence[int]]) -> Any:
    """Gives a model of fewer experts the weights of the kept ones, by comparing shapes.

    Args:
        model: the original.
        smaller: a model of the same family with as many experts as are kept, weights unused.
        kept: kept experts by layer.
    """
    source = model.state_dict()
    picked = {}
    for name, tensor in smaller.state_dict().items():
        whole = source[name]
        for dim, (before, after) in enumerate(zip(whole.shape, tensor.shape, strict=True)):
            if before != after:
                match = LAYER.search(name)
                assert match is not None
                experts = kept[int(match[1])]
                width = (before - after) // (NUM_EXPERTS - len(experts))
                places = _blocks(experts, width, before)
                assert len(places) == after
                whole = whole.index_select(dim, places)
        if name.endswith("tid2eid"):
            match = LAYER.search(name)
            assert match is not None
            whole = rehashed(whole, list(kept[int(match[1])]))
        picked[name] = whole
    smaller.load_state_dict(picked)
    return smaller.eval()


def _blocks(experts: Sequence[int], width: int, length: int) -> torch.Tensor:
    """Positions of experts that take up `width` places each, and of all behind the experts."""
    own = [expert * width + place for expert in experts for place in range(width)]
    return torch.tensor([*own, *range(width * NUM_EXPERTS, length)])


def rehashed(table: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """A table of tokens and their experts for the kept ones, entry by entry."""
    made = []
    for token, row in enumerate(table.tolist()):
        new = [kept.index(expert) if expert in kept else None for expert in row]
        for column, number in enumerate(new):
            candidates = ((token + column + step) % len(kept) for step in range(len(kept)))
            new[column] = next(c for c in candidates if c not in new) if number is None else number
        made.append(new)
    return torch.tensor(made, dtype=table.dtype)


def assert_kept_bytes(
    source: Path, output: Path, kept: Mapping[int, Sequence[int]], num_layers: int = 0
) -> None:
    """Compares every tensor of a pruned checkpoint with what names and shapes say it must be.

    Args:
        source: the original.
        output: what was pruned from it.
        kept: kept experts by layer.
        num_layers: decoder layers, on which the count of layers under ``mtp.`` carries on.
    """
    expected = expected_tensors(load_tensors(source), kept, num_layers)
    found = load_tensors(output)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(_bits(found[name]), _bits(tensor)), name


def expected_tensors(
    source: Mapping[str, torch.Tensor], kept: Mapping[int, Sequence[int]], num_layers: int = 0
) -> dict[str, torch.Tensor]:
    """The kept tensors by their new names."""
    expected = {}
    for name, tensor in source.items():
        match = LAYER.search(f".{name}")
        number = int(match[1]) if match and not OTHERS.search(f".{name}") else -1
        experts = kept.get(number + num_layers if ".mtp." in f".{name}" else number)
        own = _EXPERT.search(name)
        if experts is None:
            expected[name] = tensor
        elif name.endswith("tid2eid"):
            expected[name] = rehashed(tensor, list(experts))
        elif own is None:
            dim = _expert_dim(name, tensor)
            if dim is not None:
                length = tensor.shape[dim]
                places = _blocks(experts, length // NUM_EXPERTS, length)
                picked = tensor.index_select(dim, places)
            expected[name] = tensor if dim is None else picked
        elif int(own[1]) in experts or int(own[1]) >= NUM_EXPERTS:
            # Behind the layer's experts some are numbered that have no place of their own.
            numbered = [*experts, *range(NUM_EXPERTS, int(own[1]) + 1)]
            slot = numbered.index(int(own[1]))
            expected[f"{name[: own.start(1)]}{slot}{name[own.end(1) :]}"] = tensor
    return expected


def _expert_dim(name: str, tensor: torch.Tensor) -> int | None:
    """Router rows, correction biases and fused experts: the first dimension of that length."""
    if re.search(r"\.moe\.\w+_proj\.weight$|router_mlp\.out_proj\.weight$|balancing_biases$", name):
        return 0
    routed = ("gate.", "router", "experts.", "correction_bias", "expert_bias", "_linear.weight")
    if not any(part in name for part in routed) or "shared" in name or "_proj.weight" in name:
        return None
    if name.endswith(("experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2")):
        return 0
    # Behind the experts' rows a router may have a few for something else.
    counts = range(NUM_EXPERTS, NUM_EXPERTS + 5)
    return next((d for d, length in enumerate(tensor.shape) if length in counts), None)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
