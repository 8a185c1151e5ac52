"""Which modules hold routed experts, and how each kind of them is run.

A new kind is one file here: a class that says which modules it recognises, how they come to call
the engine, and what one expert computes.
"""

from __future__ import annotations

from typing import Final

from torch import nn

from reap_stream.model.adapters.base import ExpertsAdapter, Linear
from reap_stream.model.adapters.call import CalledExperts
from reap_stream.model.adapters.dbrx import DbrxExperts
from reap_stream.model.adapters.identity import IdentityExperts
from reap_stream.model.adapters.llama4 import Llama4Experts
from reap_stream.model.adapters.looped import LoopedExperts
from reap_stream.model.transformers_api import ExpertsCall

__all__ = ["ExpertsAdapter", "Linear", "attach_experts", "find_adapter", "is_experts_module"]

ADAPTERS: Final[tuple[ExpertsAdapter, ...]] = (
    CalledExperts(),
    IdentityExperts(),
    LoopedExperts(),
    Llama4Experts(),
    DbrxExperts(),
)


def find_adapter(module: nn.Module) -> ExpertsAdapter | None:
    """The adapter that recognises a module; None: it holds no routed experts that are known."""
    return next((adapter for adapter in ADAPTERS if adapter.recognises(module)), None)


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module holds the weights of routed experts that can be run."""
    return find_adapter(module) is not None


def attach_experts(model: nn.Module, path: str, call: ExpertsCall | None) -> None:
    """Makes `call` run the experts at `path`; None detaches. See `ExpertsAdapter.attach`."""
    adapter = find_adapter(model.get_submodule(path))
    assert adapter is not None
    adapter.attach(model, path, call)
