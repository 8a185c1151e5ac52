"""Looped experts beside others that have no weights and hand a token on as it is (longcat_flash).

A router numbers these identity experts behind those with weights, and one that it chooses adds the
token itself, times its gate weight. They are no choice of pruning: the engine runs the experts with
weights, and what the others add is added here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from reap_stream.model.adapters.base import Linear, replace_forward
from reap_stream.model.adapters.looped import LoopedExperts
from reap_stream.model.transformers_api import ExpertsCall


class IdentityExperts(LoopedExperts):
    """The adapter of looped experts with identity experts behind them.

    The module's own loop does not run with one expert a token, so an expert is computed here.
    """

    grouped: ClassVar[bool] = True

    def recognises(self, module: nn.Module) -> bool:
        """As looped experts that say how many of them do nothing."""
        return super().recognises(module) and hasattr(module, "zero_expert_num")

    def counts(self, module: nn.Module) -> set[int]:
        """Experts with weights: identity experts may have some too, which nothing reads."""
        experts: Any = module
        return {int(experts.down_proj.shape[0])}

    def run(
        self,
        module: Any,
        rows: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
        linear: Linear,
        /,
    ) -> torch.Tensor:
        """Gate and up projection, activation, down projection."""
        gate, up = linear(rows, parameters["gate_up_proj"], None).chunk(2, dim=-1)
        return linear(module.act_fn(gate) * up, parameters["down_proj"], None)

    def attach(self, model: nn.Module, path: str, call: ExpertsCall | None) -> None:
        """See `ExpertsAdapter.attach`."""
        module = model.get_submodule(path)
        (count,) = self.counts(module)
        replace_forward(module, call and _with_identity(call, count))


def _with_identity(call: ExpertsCall, count: int) -> ExpertsCall:
    def forward(
        hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        itself = torch.where(top_k_index < count, 0, top_k_weights).sum(dim=-1, keepdim=True)
        routed = call(hidden_states, top_k_index, top_k_weights)
        return (routed.float() + hidden_states.float() * itself.float()).to(hidden_states.dtype)

    return forward
