"""How a model's own parameters are written in the spelling of a published checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

GATE_UP = re.compile(r"(.*experts\.)gate_up_proj$")
STACKED = re.compile(r"(.*experts\.)(down|up)_proj$")
CONVOLUTION = re.compile(r"(.*)\.conv1d\.weight$")
W123 = {"gate": "w1", "up": "w3", "down": "w2"}
PROJECTIONS = {part: f"{part}_proj" for part in ("gate", "up", "down")}


@dataclass(frozen=True)
class Layout:
    """How a family is published.

    Attributes:
        family: id of the family.
        projections: what an expert's projections are called; None: experts are stored fused.
        renames: (pattern, replacement) in the names of parameters, applied in order, experts'
            numbers already in place.
        splits_convolution: q, k and v of a short convolution are stored apart.
        config: config.json's values under the publisher's keys; None: the key is not there.
        names: some names of the checkpoint, as the published index spells them.
    """

    family: str
    names: tuple[str, ...]
    projections: Mapping[str, str] | None = field(default_factory=lambda: PROJECTIONS)
    renames: tuple[tuple[str, str], ...] = ()
    splits_convolution: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A model's state dict in this layout."""
        return {
            self._renamed(name): part
            for full, tensor in state.items()
            for name, part in self._pieces(full, tensor)
        }

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def _pieces(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        joined, stacked, convolution = (p.match(name) for p in (GATE_UP, STACKED, CONVOLUTION))
        if convolution and self.splits_convolution:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{convolution[1]}.{letter}_conv1d.weight", part.clone()
        elif joined and self.projections:
            for expert, matrix in enumerate(tensor):
                for part, rows in zip(("gate", "up"), matrix.chunk(2), strict=True):
                    yield f"{joined[1]}{expert}.{self.projections[part]}.weight", rows.clone()
        elif stacked and self.projections:
            for expert, matrix in enumerate(tensor):
                yield f"{stacked[1]}{expert}.{self.projections[stacked[2]]}.weight", matrix.clone()
        else:
            yield name, tensor


def written_by_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4 and the publishers wrote it: rope and dtype in older keys."""
    old = dict(config)
    rope = old.pop("rope_parameters", None) or {}
    old["torch_dtype"] = old.pop("dtype")
    old["transformers_version"] = "4.57.1"
    if "rope_theta" in rope:
        theta, kind = rope["rope_theta"], rope.get("rope_type", "default")
        own = {"rope_theta", "rope_type", "partial_rotary_factor"}
        scaling = {key: value for key, value in rope.items() if key not in own}
        old["rope_theta"] = theta
        old["rope_scaling"] = None if kind == "default" else {**scaling, "rope_type": kind}
        if "partial_rotary_factor" in rope:
            old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return old
