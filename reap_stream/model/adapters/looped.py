"""Experts that take the router's choice as transformers' experts call does, in a loop of their own.

Such a module is given hidden states, indices and gate weights like all others, but does not ask
transformers' registry who runs them (step3p7). One expert is run by the module's
own code: on that expert's parameters alone, every row sent to it with a gate weight of one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

from reap_stream.model.adapters.base import (
    ExpertsAdapter,
    Linear,
    replace_forward,
    run_own_forward,
)
from reap_stream.model.transformers_api import ExpertsCall, uses_experts_call

_ARGUMENTS: Final = ["self", "hidden_states", "top_k_index", "top_k_weights"]
_PARAMETERS: Final = {"gate_up_proj", "down_proj"}


class LoopedExperts(ExpertsAdapter):
    """The adapter of experts modules that loop over their experts."""

    def recognises(self, module: nn.Module) -> bool:
        """By what the forward takes and the parameters it has for all experts at once."""
        own = dict(module.named_parameters(recurse=False))
        return (
            not uses_experts_call(module)
            and own.keys() == _PARAMETERS
            and all(tensor.dim() == 3 for tensor in own.values())
            and list(inspect.signature(type(module).forward).parameters) == _ARGUMENTS
        )

    def attach(self, model: nn.Module, path: str, call: ExpertsCall | None) -> None:
        """See `ExpertsAdapter.attach`."""
        replace_forward(model.get_submodule(path), call and _as_forward(call))

    def run(
        self,
        module: Any,
        rows: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
        _linear: Linear,
        /,
    ) -> torch.Tensor:
        """The module's own loop over one expert."""
        index = rows.new_zeros((len(rows), 1), dtype=torch.int64)
        gates = rows.new_ones((len(rows), 1))
        alone = {leaf: tensor[None] for leaf, tensor in parameters.items()}
        return run_own_forward(module, alone, rows, index, gates)


def _as_forward(call: ExpertsCall) -> ExpertsCall:
    # Modules are called with these names as often as by position.
    def forward(
        hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return call(hidden_states, top_k_index, top_k_weights)

    return forward
