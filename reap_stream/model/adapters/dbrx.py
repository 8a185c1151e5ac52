"""DBRX: three matrices hold the experts of a layer one below the other, [experts × width, hidden].

The matrices belong to a module inside the one that is called, and that module computes one expert
when it is handed its rows of each matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from reap_stream.model.adapters.base import ExpertsAdapter, Linear, replace_forward
from reap_stream.model.transformers_api import ExpertsCall, is_transformers_class


class DbrxExperts(ExpertsAdapter):
    """The adapter of `DbrxExpertGLU` in a `DbrxExperts`."""

    def recognises(self, module: nn.Module) -> bool:
        """By class."""
        return is_transformers_class(module, "DbrxExpertGLU")

    def counts(self, module: nn.Module) -> set[int]:
        """Experts of each matrix, which holds `ffn_hidden_size` rows of each."""
        width = int(getattr(module, "ffn_hidden_size", 1))
        return {tensor.shape[0] // width for tensor in module.parameters(recurse=False)}

    def attach(self, model: nn.Module, path: str, call: ExpertsCall | None) -> None:
        """Replaces the forward of the module around the matrices."""
        around = model.get_submodule(path.rpartition(".")[0])
        replace_forward(around, call and _as_forward(call))

    def run(
        self,
        module: Any,
        rows: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
        _linear: Linear,
        /,
    ) -> torch.Tensor:
        """The module's own code, which takes one expert's rows of the matrices."""
        output: torch.Tensor = module(rows, parameters["w1"], parameters["v1"], parameters["w2"])
        return output


def _as_forward(call: ExpertsCall) -> ExpertsCall:
    def forward(
        hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return call(flat, top_k_index, top_k_weights).view(hidden_states.shape)

    return forward
