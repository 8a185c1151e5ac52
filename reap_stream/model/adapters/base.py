"""What the engine must know of a module that holds the routed experts of a layer.

Most families run their experts through one call of transformers; the others differ in who calls
them and with what, and each kind has a small adapter. Whatever the kind, the engine is called
with hidden states, the router's choice and its gate weights, and asks back for one expert's
output on some rows.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.func import functional_call

from reap_stream.model.transformers_api import ExpertsCall

Linear = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""Rows [n, in] × weight [..., out, in] (+ bias) → [n, out], of one expert or grouped by expert."""


class ExpertsAdapter(ABC):
    """How the experts of one kind of module are recognised, called and computed.

    Attributes:
        gate_on_input: the gate weight multiplies what an expert is given, not what it returns.
        grouped: `run` works with all experts stacked and a grouped `Linear`.
    """

    gate_on_input: ClassVar[bool] = False
    grouped: ClassVar[bool] = False

    @abstractmethod
    def recognises(self, module: nn.Module) -> bool:
        """Whether this module holds the weights of routed experts of this kind."""

    def counts(self, module: nn.Module) -> set[int]:
        """Numbers of experts that the module's own parameters show: one, in a sound model."""
        return {tensor.shape[0] for tensor in module.parameters(recurse=False)}

    @abstractmethod
    def attach(self, model: nn.Module, path: str, call: ExpertsCall | None) -> None:
        """Makes `call(hidden_states, top_k_index, top_k_weights)` run a module's experts.

        Args:
            model: the model.
            path: dotted path of the module in it.
            call: takes [tokens, hidden], [tokens, k], [tokens, k]; None: as it was before.
        """

    @abstractmethod
    def run(
        self,
        module: Any,
        rows: torch.Tensor,
        parameters: Mapping[str, torch.Tensor],
        linear: Linear,
        /,
    ) -> torch.Tensor:
        """One expert's output before its gate weight.

        Args:
            module: the experts module; its own weights are unused.
            rows: [n, hidden] what the expert is given.
            parameters: leaf name → the expert's parameter; all experts' where `grouped`.
            linear: multiplies by a parameter.

        Returns:
            [n, hidden].
        """


def replace_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Gives one module another forward; None: that of its class again."""
    if forward is None:
        vars(module).pop("forward", None)
    else:
        module.forward = forward


def run_own_forward(
    module: nn.Module, parameters: Mapping[str, torch.Tensor], *args: torch.Tensor
) -> torch.Tensor:
    """A module's own code on other parameters, whatever its forward was replaced by."""
    bare = copy.copy(module)
    replace_forward(bare, None)
    output: torch.Tensor = functional_call(bare, dict(parameters), args)
    return output
