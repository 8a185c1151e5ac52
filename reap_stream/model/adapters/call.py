"""Experts behind transformers' experts call: nearly every family.

Flags on the module say how an expert computes: with a gate projection or without, with biases,
with transposed weights, with a norm behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from reap_stream.model.adapters.base import ExpertsAdapter, Linear
from reap_stream.model.transformers_api import (
    ExpertsCall,
    apply_gate,
    attach_to_call,
    uses_experts_call,
)


class CalledExperts(ExpertsAdapter):
    """The adapter of transformers' experts call."""

    grouped: ClassVar[bool] = True

    def recognises(self, module: nn.Module) -> bool:
        """See `ExpertsAdapter.recognises`."""
        return uses_experts_call(module)

    def attach(self, model: nn.Module, path: str, call: ExpertsCall | None) -> None:
        """See `ExpertsAdapter.attach`."""
        attach_to_call(model.get_submodule(path), call)

    def run(
        self,
        module: Any,
        rows: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
        linear: Linear,
        /,
    ) -> torch.Tensor:
        """Up (and gate) projection, activation, down projection."""
        leaf = "gate_up_proj" if module.has_gate else "up_proj"
        hidden = _project(module, rows, parameters, leaf, linear)
        hidden = apply_gate(module, hidden) if module.has_gate else module.act_fn(hidden)
        hidden = _project(module, hidden, parameters, "down_proj", linear)
        # Older releases of transformers lack the flag: no family has the norm there.
        normed = getattr(module, "has_post_expert_norm", False)
        output: torch.Tensor = module.post_expert_norm(hidden) if normed else hidden
        return output


def _project(
    module: Any,
    rows: torch.Tensor,
    parameters: Mapping[str, torch.Tensor],
    leaf: str,
    linear: Linear,
) -> torch.Tensor:
    weight = parameters[leaf]
    weight = weight.transpose(-2, -1) if module.is_transposed else weight
    return linear(rows, weight, parameters[f"{leaf}_bias"] if module.has_bias else None)
