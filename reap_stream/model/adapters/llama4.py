"""Llama 4: every expert is given every token, scaled by its gate weight before the expert.

An expert j adds f_j(g_j(x) · x) to the layer's output, where other families add g_j(x) · f_j(x).
Only tokens that the router chose an expert for have a gate weight other than zero, and an expert
without biases gives zero for zero, so it is enough to run the chosen ones.

What the statistics count as the expert's output before the gate is f_j(g_j · x) / g_j: then gate ×
norm is the norm of what the expert adds to the layer's output, as eq. 9 has it everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from reap_stream.model.adapters.base import (
    ExpertsAdapter,
    Linear,
    replace_forward,
    run_own_forward,
)
from reap_stream.model.transformers_api import ExpertsCall, is_transformers_class


class Llama4Experts(ExpertsAdapter):
    """The adapter of `Llama4TextExperts` in a `Llama4TextMoe`."""

    gate_on_input: ClassVar[bool] = True

    def recognises(self, module: nn.Module) -> bool:
        """By class: nothing but its code says that gates are on the input."""
        return is_transformers_class(module, "Llama4TextExperts")

    def attach(self, model: nn.Module, path: str, call: ExpertsCall | None) -> None:
        """Replaces the forward of the block around the experts, which repeats tokens for each."""
        block: Any = model.get_submodule(path.rpartition(".")[0])
        replace_forward(block, call and _block_forward(block, call))

    def run(
        self,
        module: Any,
        rows: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
        _linear: Linear,
        /,
    ) -> torch.Tensor:
        """The module's own batched product with a batch of one expert."""
        alone = {leaf: tensor[None] for leaf, tensor in parameters.items()}
        return run_own_forward(module, alone, rows)


def _block_forward(block: Any, call: ExpertsCall) -> Any:
    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden_states.reshape(-1, block.hidden_dim)
        scores, logits = block.router(hidden)
        # The router's own choice by its own logits: scores far from the others may round to zero.
        index = torch.topk(logits, block.router.top_k, dim=1).indices
        routed = call(hidden, index, scores.gather(1, index))
        return block.shared_expert(hidden) + routed, logits

    return forward
