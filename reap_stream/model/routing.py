"""How a layer's router chooses, read from the modules that choose and from nothing beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from reap_stream.errors import UnsupportedError
from reap_stream.model.adapters import is_experts_module

_TOP_K_ATTRIBUTES = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "topk",
    "top_k_experts",
)
# Not "n_groups": that is what Mamba layers call groups of their heads.
_GROUP_ATTRIBUTES = ("num_group", "n_group", "num_expert_group")


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router chooses.

    Attributes:
        experts_per_token: experts each token is sent to.
        groups: contiguous groups the experts are divided into (1: no groups).
        topk_groups: groups a token may choose from.
    """

    experts_per_token: int
    groups: int
    topk_groups: int


def read_routing(model: Any, layer: str, experts: str, sliced: Mapping[str, int]) -> Routing:
    """How the router of one layer chooses.

    Args:
        model: the model.
        layer: dotted path of the layer.
        experts: dotted path of its routed-experts module.
        sliced: parameters that hold experts, the router's among them.

    Raises:
        UnsupportedError: nothing says how many experts a token is sent to.
    """
    routers = [model.get_submodule(path) for path in _router_paths(layer, experts, sliced)]
    block = [m for m in model.get_submodule(layer).modules() if not is_experts_module(m)]
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    top_k = _attribute([*routers, *block, text], _TOP_K_ATTRIBUTES)
    if top_k is None:
        message = f"{type(model).__name__} does not say how many experts a token is sent to"
        raise UnsupportedError(message)
    groups = _attribute(routers, _GROUP_ATTRIBUTES) or _attribute([text], ("n_group",)) or 1
    topk_groups = _attribute([*routers, text], ("topk_group",)) or groups
    return Routing(top_k, groups, topk_groups if groups > 1 else 1)


def _router_paths(layer: str, experts: str, sliced: Mapping[str, int]) -> list[str]:
    """Modules that choose experts: owners of a router's parameters, then the blocks around them.

    Others in the layer use the same words for other things.
    """
    owners = {name.rpartition(".")[0]: None for name in sliced if name.startswith(layer + ".")}
    owners.pop(experts, None)
    around = [path.rpartition(".")[0] for path in (*owners, experts)]
    return list(dict.fromkeys([*owners, *(path for path in around if path != layer)]))


def _attribute(owners: Iterable[Any], names: tuple[str, ...]) -> int | None:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            value = value[0] if isinstance(value, list) and value else value
            if type(value) is int and value > 0:
                return value
    return None
