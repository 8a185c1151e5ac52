"""Where in a model its text decoder lies, and which routed experts are the decoder's.

A vision-language or omni model is several models in one, and more than one of them may have
routed experts. Calibration text runs through the decoder alone, so only its experts can be scored.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from reap_stream.errors import UnsupportedError
from reap_stream.model.adapters import find_adapter, is_experts_module

# Classes whose name says so though nothing knows how to run them.
_OF_EXPERTS = re.compile(r"Expert|MoE$")


@dataclass(frozen=True, slots=True)
class Decoder:
    """The part of a model that text runs through.

    Attributes:
        layers_path: dotted path of the list of decoder layers.
        num_layers: decoder layers.
        experts_paths: MoE layer → dotted path of its routed-experts module.
        text_path: dotted path of the module whose forward takes text; empty: the model itself.
        other_experts: routed-experts modules elsewhere, which text does not reach.
    """

    layers_path: str
    num_layers: int
    experts_paths: dict[int, str]
    text_path: str
    other_experts: tuple[str, ...]


def find_decoder(model: Any) -> Decoder:
    """Finds the text decoder of a model.

    Raises:
        UnsupportedError: the model has no routed experts that can be run, or the decoder's are not
            one group for each layer of one list.
    """
    by_list: dict[str, list[str]] = defaultdict(list)
    for path in _experts_paths(model):
        by_list[_layer_list(model, path)].append(path)
    layers_path = _text_list(model, by_list)
    prefix = layers_path + "."
    paths: dict[int, str] = {}
    for path in by_list[layers_path]:
        layer = int(path.removeprefix(prefix).split(".", 1)[0])
        if layer in paths:
            _refuse_groups(model, paths[layer], path)
        paths[layer] = path
    return Decoder(
        layers_path=layers_path,
        num_layers=len(list(model.get_submodule(layers_path).children())),
        experts_paths=paths,
        text_path=_text_path(model, layers_path),
        other_experts=tuple(p for name, ps in by_list.items() if name != layers_path for p in ps),
    )


def expert_counts(model: nn.Module, paths: Iterable[str]) -> set[int]:
    """Numbers of experts that modules have; 0 where the model has no such module."""
    modules = dict(model.named_modules())
    counts: set[int] = set()
    for path in paths:
        module = modules.get(path)
        adapter = None if module is None else find_adapter(module)
        counts |= adapter.counts(modules[path]) if adapter is not None else {0}
    return counts


def _experts_paths(model: nn.Module) -> list[str]:
    found = [name for name, module in model.named_modules() if is_experts_module(module)]
    if found:
        return found
    kind = type(model).__name__
    names = {type(module).__name__ for module in model.modules()}
    suspects = sorted(name for name in names if _OF_EXPERTS.search(name))
    if suspects:
        message = (
            f"{kind} runs its experts in {', '.join(suspects)} and not through transformers' "
            "experts call; this version has no adapter for it"
        )
    else:
        message = f"{kind} has no Mixture-of-Experts layers: there is nothing to prune"
    raise UnsupportedError(message)


def _layer_list(model: nn.Module, path: str) -> str:
    """The outermost list of modules in which a module lies."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end])
        if isinstance(model.get_submodule(prefix), nn.ModuleList):
            return prefix
    message = (
        f"{type(model).__name__} does not hold its MoE layers in a list of decoder layers "
        f"({path} is in none)"
    )
    raise UnsupportedError(message)


def _text_list(model: Any, lists: Iterable[str]) -> str:
    """Of the lists of layers with experts, the one that text runs through."""
    found = sorted(lists)
    if len(found) == 1:
        return found[0]
    text = type(model.config.get_text_config(decoder=True))
    own = [path for path in found if type(_nearest_config(model, path)) is text]
    if len(own) == 1:
        return own[0]
    message = (
        f"{type(model).__name__} does not hold its MoE layers in one list of decoder layers "
        f"(found {found})"
    )
    raise UnsupportedError(message)


def _nearest_config(model: Any, path: str) -> Any:
    """The config of the innermost model around a module."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        if config is not None:
            return config
    return None


def _text_path(model: nn.Module, layers_path: str) -> str:
    """The outermost module around the layers that has a forward.

    An omni model has none of its own where it only passes parts of a conversation to its models.
    """
    parts = layers_path.split(".")
    for end in range(len(parts)):
        path = ".".join(parts[:end])
        if type(model.get_submodule(path)).forward is not nn.Module.forward:
            return path
    return ""


def _refuse_groups(model: nn.Module, first: str, second: str) -> None:
    message = (
        f"{type(model).__name__} has several routed-experts modules in a layer ({first}, {second}): "
        "one number in config.json counts the experts of all of them, and calibration text reaches "
        "only some, so there is nothing to choose the others by"
    )
    raise UnsupportedError(message)
