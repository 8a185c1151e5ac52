"""What a model is, asked of transformers and not of a table of families.

transformers' own model class is built without weights from config.json. It is built a second
time with fewer experts, and the parameters whose shape differs are the ones that pruning
slices, along the dimension that differs: experts, router rows, correction biases, whatever
the family calls them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reap_stream.errors import UnsupportedError
from reap_stream.model.routing import Routing, read_routing
from reap_stream.model.transformers_api import build_meta_model, is_experts_module, load_config

# Integer config keys that speak of experts without being the number of them.
_NOT_A_COUNT = re.compile(r"per_tok|top_?k|shared|used|active|zero|null|size|dim|group|layer|freq")


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model without weights and what pruning must know of it.

    Attributes:
        name: model class, as config.json's `architectures` has it where it says so.
        model: transformers' model on the meta device, its experts calling us.
        layers_path: dotted path of the list of decoder layers.
        num_layers: decoder layers.
        experts_paths: MoE layer → dotted path of its routed-experts module.
        num_experts: routed experts of each MoE layer.
        routing: how the routers choose.
        count_paths: raw config.json keys that hold the number of experts.
        sliced: parameter or buffer → dimension along which its experts lie.
        tied: parameters that share another's storage and need no tensor of their own.
    """

    name: str
    model: Any
    layers_path: str
    num_layers: int
    experts_paths: dict[int, str]
    num_experts: int
    routing: Routing
    count_paths: tuple[tuple[str, ...], ...]
    sliced: dict[str, int]
    tied: frozenset[str] = field(default_factory=frozenset)

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers with routed experts, ascending."""
        return sorted(self.experts_paths)

    def layer_of(self, parameter: str) -> int | None:
        """The decoder layer a parameter belongs to, or None."""
        prefix = self.layers_path + "."
        if not parameter.startswith(prefix):
            return None
        return int(parameter.removeprefix(prefix).split(".", 1)[0])

    def total_parameters(self, keep: int | None = None) -> int:
        """Parameters of the decoder with `keep` experts a layer (default: all)."""
        kept = self.num_experts if keep is None else keep
        total = 0
        parameters: Iterator[tuple[str, torch.Tensor]] = self.model.named_parameters()
        for name, tensor in parameters:
            if name in self.sliced:
                total += tensor.numel() // self.num_experts * kept
            else:
                total += tensor.numel()
        return total

    def active_parameters(self, keep: int | None = None) -> int:
        """Parameters one token uses: all but the experts it is not sent to."""
        kept = self.num_experts if keep is None else keep
        expert: int = sum(
            tensor.numel() // self.num_experts
            for path in self.experts_paths.values()
            for tensor in self.model.get_submodule(path).parameters(recurse=False)
        )
        return self.total_parameters(keep) - expert * (kept - self.routing.experts_per_token)


def read_architecture(
    directory: Path,
    raw_config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
    trust_remote_code: bool = False,
) -> Architecture:
    """Learns a model's architecture from its config.json.

    Args:
        directory: the checkpoint.
        raw_config: config.json as parsed JSON.
        dtype: dtype the forward computes in.
        trust_remote_code: let the checkpoint's own code build the model.

    Raises:
        UnsupportedError: the family has no MoE layers, does not run its experts through
            transformers' experts call, or does not have one number of experts.
    """
    config = load_config(directory, raw_config, trust_remote_code=trust_remote_code)
    model = build_meta_model(config, dtype, trust_remote_code=trust_remote_code)
    experts = _experts_modules(model)
    layers_path, num_layers = _layer_list(model, experts)
    num_experts = _one_count(model, experts)
    count_paths, reduced, fewer = _find_count_keys(
        directory, raw_config, num_experts, dtype=dtype, trust_remote_code=trust_remote_code
    )
    prefix = layers_path + "."
    paths = {int(path.removeprefix(prefix).split(".", 1)[0]): path for path in experts}
    if len(paths) != len(experts):
        message = f"{type(model).__name__} has layers with several routed-experts modules"
        raise UnsupportedError(message)
    sliced = _shape_difference(model, reduced, num_experts, fewer)
    return Architecture(
        name=(raw_config.get("architectures") or [type(model).__name__])[0],
        model=model,
        layers_path=layers_path,
        num_layers=num_layers,
        experts_paths=paths,
        num_experts=num_experts,
        routing=read_routing(model, f"{prefix}{min(paths)}", paths[min(paths)], sliced),
        count_paths=count_paths,
        sliced=sliced,
        tied=frozenset(getattr(model, "all_tied_weights_keys", None) or {}),
    )


def _experts_modules(model: nn.Module) -> list[str]:
    found = [name for name, module in model.named_modules() if is_experts_module(module)]
    if found:
        return found
    kind = type(model).__name__
    suspects = sorted(
        {type(module).__name__ for module in model.modules() if "Expert" in type(module).__name__}
    )
    if suspects:
        message = (
            f"{kind} runs its experts in {', '.join(suspects)} and not through transformers' "
            "experts call; this version has no adapter for it"
        )
    else:
        message = f"{kind} has no Mixture-of-Experts layers: there is nothing to prune"
    raise UnsupportedError(message)


def _layer_list(model: nn.Module, experts: list[str]) -> tuple[str, int]:
    lists = set()
    for path in experts:
        parts = path.split(".")
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts)))
        lists.add(
            next((p for p in prefixes if isinstance(model.get_submodule(p), nn.ModuleList)), None)
        )
    if len(lists) != 1 or None in lists:
        message = (
            f"{type(model).__name__} does not hold its MoE layers in one list of decoder layers "
            f"(found {sorted(map(str, lists))})"
        )
        raise UnsupportedError(message)
    path = str(lists.pop())
    return path, len(list(model.get_submodule(path).children()))


def _one_count(model: nn.Module, experts: list[str]) -> int:
    counts = {
        tensor.shape[0]
        for path in experts
        for tensor in model.get_submodule(path).parameters(recurse=False)
    }
    if len(counts) != 1:
        message = (
            f"{type(model).__name__} has MoE layers of {sorted(counts)} experts; serving engines "
            "and this tool expect one number for all layers"
        )
        raise UnsupportedError(message)
    return int(counts.pop())


def _count_candidates(
    config: Mapping[str, Any], num_experts: int, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and key != "quantization_config":
            yield from _count_candidates(value, num_experts, (*path, key))
        if "expert" not in key or _NOT_A_COUNT.search(key):
            continue
        values = value if isinstance(value, list) and value else [value]
        if all(type(entry) is int and entry == num_experts for entry in values):
            yield (*path, key)


def with_expert_count(
    raw_config: Mapping[str, Any], paths: tuple[tuple[str, ...], ...], count: int
) -> dict[str, Any]:
    """A copy of the raw config in which every key of `paths` says `count` experts."""
    changed = copy.deepcopy(dict(raw_config))
    for *parents, key in paths:
        owner = changed
        for parent in parents:
            owner = owner[parent]
        owner[key] = [count] * len(owner[key]) if isinstance(owner[key], list) else count
    return changed


def _find_count_keys(
    directory: Path,
    raw_config: Mapping[str, Any],
    num_experts: int,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> tuple[tuple[tuple[str, ...], ...], Any, int]:
    """The config keys that hold the number of experts, proved by building the smaller model."""
    paths = tuple(_count_candidates(raw_config, num_experts))
    failure = f"no key of config.json holds the number of experts ({num_experts})"
    for fewer in (num_experts - 1, num_experts // 2) if paths else ():
        if fewer < 1:
            continue
        try:
            raw = with_expert_count(raw_config, paths, fewer)
            smaller = load_config(directory, raw, trust_remote_code=trust_remote_code)
            reduced = build_meta_model(smaller, dtype, trust_remote_code=trust_remote_code)
        except UnsupportedError as error:
            failure = f"a model of {fewer} experts cannot be built: {error}"
            continue
        if _one_count(reduced, _experts_modules(reduced)) == fewer:
            return paths, reduced, fewer
        failure = f"config keys {['.'.join(p) for p in paths]} do not set the number of experts"
    message = f"{directory / 'config.json'}: {failure}"
    raise UnsupportedError(message)


def _shape_difference(
    model: nn.Module, reduced: nn.Module, num_experts: int, fewer: int
) -> dict[str, int]:
    sliced: dict[str, int] = {}
    small = {name: tensor.shape for name, tensor in reduced.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if name not in small or len(small[name]) != tensor.dim():
            message = f"{type(model).__name__}: {name} changes its form with the number of experts"
            raise UnsupportedError(message)
        dims = [d for d in range(tensor.dim()) if tensor.shape[d] != small[name][d]]
        if not dims:
            continue
        lengths = [(tensor.shape[d], small[name][d]) for d in dims]
        if lengths != [(num_experts, fewer)]:
            message = (
                f"{type(model).__name__}: {name} is {list(tensor.shape)} with {num_experts} "
                f"experts and {list(small[name])} with {fewer}; expected one dimension of that "
                "length to differ"
            )
            raise UnsupportedError(message)
        sliced[name] = dims[0]
    return sliced
