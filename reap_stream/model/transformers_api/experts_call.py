"""The one call through which transformers runs the routed experts of most families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_mm

from reap_stream.errors import ReapStreamError

EXPERTS_IMPLEMENTATION = "reap_stream"
_RUNNER = "_reap_stream_runner"
ExpertsCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def register_experts() -> None:
    """Makes transformers know our implementation of the call."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _experts_function)


def uses_experts_call(module: nn.Module) -> bool:
    """Whether a module's forward goes through transformers' registry of experts functions."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_concatenated")


def attach_to_call(module: nn.Module, call: ExpertsCall | None) -> None:
    """Makes `call(hidden_states, top_k_index, top_k_weights)` a module's experts; None detaches."""
    setattr(module, _RUNNER, call)


def _experts_function(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    call: ExpertsCall | None = getattr(module, _RUNNER, None)
    if call is None:
        message = f"{type(module).__name__} was called without a layer's weights"
        raise ReapStreamError(message)
    return call(hidden_states, top_k_index, top_k_weights)


def apply_gate(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The family's own way of joining gate and up projections [n, 2 × width] → [n, width]."""
    joined: torch.Tensor = module._apply_gate(hidden)
    return joined


def grouped_product(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows [n, in] sorted by group × weights [groups, in, out]; `ends` int32: end of each group."""
    product: torch.Tensor = _grouped_mm(rows, weights, offs=ends)
    return product


def is_transformers_class(module: nn.Module, name: str) -> bool:
    """Whether a module is of a class of that name which transformers defines."""
    return any(
        kind.__name__ == name and kind.__module__.startswith("transformers.")
        for kind in type(module).__mro__
    )
