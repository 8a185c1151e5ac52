"""Which keys of config.json hold the number of experts, and what changes with it.

Nothing is guessed: the model is built a second time with fewer experts, and what came out smaller
is what the keys count. Parameters whose shape differs are the ones that pruning slices.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reap_stream.errors import UnsupportedError
from reap_stream.model.decoder import Decoder, expert_counts
from reap_stream.model.transformers_api import build_meta_model, load_config

# Integer config keys that speak of experts without being the number of them.
_NOT_A_COUNT = re.compile(r"per_tok|top_?k|shared|used|active|zero|null|size|dim|group|layer|freq")

KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Smaller:
    """A model of fewer experts.

    Attributes:
        count_paths: raw config.json keys that were changed.
        model: the model, without weights.
        count: experts of each of its layers.
    """

    count_paths: tuple[KeyPath, ...]
    model: Any
    count: int


def with_expert_count(
    raw_config: Mapping[str, Any], paths: tuple[KeyPath, ...], count: int
) -> dict[str, Any]:
    """A copy of the raw config in which every key of `paths` says `count` experts."""
    changed = copy.deepcopy(dict(raw_config))
    for *parents, key in paths:
        owner = changed
        for parent in parents:
            owner = owner[parent]
        owner[key] = [count] * len(owner[key]) if isinstance(owner[key], list) else count
    return changed


def build_smaller(
    directory: Path,
    raw_config: Mapping[str, Any],
    model: Any,
    decoder: Decoder,
    *,
    trust_remote_code: bool,
) -> Smaller:
    """Finds the config keys of the decoder's number of experts, proved by the smaller model.

    Raises:
        UnsupportedError: no set of keys gives the decoder fewer experts and leaves others alone.
    """

    def build(paths: tuple[KeyPath, ...], count: int) -> Any:
        raw = with_expert_count(raw_config, paths, count)
        config = load_config(directory, raw, trust_remote_code=trust_remote_code)
        return build_meta_model(config, model.dtype, trust_remote_code=trust_remote_code)

    (num_experts,) = expert_counts(model, decoder.experts_paths.values())
    others = expert_counts(model, decoder.other_experts)
    failure = f"no key of config.json holds the number of experts ({num_experts})"
    for paths in _key_choices(raw_config, num_experts):
        for fewer in dict.fromkeys((num_experts - 1, num_experts // 2)):
            if fewer < 1:
                continue
            reduced, reason = _try_build(build, paths, fewer, decoder, others)
            if reduced is not None:
                return Smaller(paths, reduced, fewer)
            failure = reason
    message = f"{directory / 'config.json'}: {failure}"
    raise UnsupportedError(message)


def _try_build(
    build: Callable[[tuple[KeyPath, ...], int], Any],
    paths: tuple[KeyPath, ...],
    fewer: int,
    decoder: Decoder,
    others: set[int],
) -> tuple[Any, str]:
    """The model in which `paths` say `fewer`, or why they are not the decoder's number."""
    keys = [".".join(path) for path in paths]
    try:
        reduced = build(paths, fewer)
    except UnsupportedError as error:
        return None, f"a model of {fewer} experts cannot be built: {error}"
    if expert_counts(reduced, decoder.experts_paths.values()) != {fewer}:
        return None, f"config keys {keys} do not set the number of experts"
    if expert_counts(reduced, decoder.other_experts) != others:
        return None, (
            f"config keys {keys} also count the experts of {decoder.other_experts[0]}, which "
            "calibration text does not reach: there is nothing to choose those by"
        )
    return reduced, ""


def _key_choices(raw_config: Mapping[str, Any], num_experts: int) -> Iterator[tuple[KeyPath, ...]]:
    """Sets of keys that may hold the number, the likelier first.

    Those of one part of the config and of what that part lies in, where the number may stand again;
    all of them last.
    """
    found = tuple(_count_candidates(raw_config, num_experts))
    parts = dict.fromkeys(path[:-1] for path in found)
    choices = [tuple(p for p in found if part[: len(p) - 1] == p[:-1]) for part in parts]
    yield from dict.fromkeys([*sorted(choices, key=len, reverse=True), *([found] if found else [])])


def _count_candidates(
    config: Mapping[str, Any], num_experts: int, path: KeyPath = ()
) -> Iterator[KeyPath]:
    for key, value in config.items():
        if isinstance(value, Mapping) and key != "quantization_config":
            yield from _count_candidates(value, num_experts, (*path, key))
        if "expert" not in key or _NOT_A_COUNT.search(key):
            continue
        values = value if isinstance(value, list) and value else [value]
        if all(type(entry) is int and entry == num_experts for entry in values):
            yield (*path, key)


def shape_difference(
    model: nn.Module, num_experts: int, reduced: nn.Module, fewer: int
) -> dict[str, int]:
    """Parameters and buffers that hold experts → dimension along which they lie.

    Raises:
        UnsupportedError: one changes in another way than along one dimension that holds the experts
            one after the other, each as long as the others; more may follow them.
    """
    sliced: dict[str, int] = {}
    small: dict[str, torch.Tensor] = reduced.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in small or small[name].dim() != tensor.dim():
            message = f"{type(model).__name__}: {name} changes its form with the number of experts"
            raise UnsupportedError(message)
        after = small[name].shape
        dims = [d for d in range(tensor.dim()) if tensor.shape[d] != after[d]]
        if not dims:
            continue
        gone = tensor.shape[dims[0]] - after[dims[0]]
        each = gone // (num_experts - fewer)
        uneven = (
            gone <= 0 or gone % (num_experts - fewer) or each * num_experts > tensor.shape[dims[0]]
        )
        if len(dims) > 1 or uneven:
            message = (
                f"{type(model).__name__}: {name} is {list(tensor.shape)} with {num_experts} "
                f"experts and {list(after)} with {fewer}; expected one dimension that holds "
                "experts to differ"
            )
            raise UnsupportedError(message)
        sliced[name] = dims[0]
    return sliced


def extra_entries(
    model: nn.Module, num_experts: int, smaller: Smaller, sliced: Mapping[str, int]
) -> dict[str, int]:
    """Sliced parameters in which more lies behind the experts → entries that belong to none.

    A router may have rows for shared experts, or for one that does nothing, behind those that
    its layer's routed experts are numbered by.
    """
    small: dict[str, torch.Tensor] = smaller.model.state_dict()
    found: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        dim = sliced.get(name)
        if dim is None:
            continue
        each = (tensor.shape[dim] - small[name].shape[dim]) // (num_experts - smaller.count)
        extra = int(tensor.shape[dim]) - each * num_experts
        if extra:
            found[name] = extra
    return found
