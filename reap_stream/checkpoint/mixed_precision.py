"""Layers in which quantisation settings treat experts differently.

Engines load a layer's experts as one tensor and ask the settings once, of its first expert.
Pruning gives that number to another expert, so settings that are not the same for all may mean
something else afterwards even though every name follows its expert.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from reap_stream.checkpoint.expert_names import parse_expert_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


_Place = tuple[int, tuple[tuple[str, ...], tuple[str, ...]]]


def mixed_layers(settings: Any, names: Iterable[str], num_layers: int) -> list[int]:
    """Layers of which some experts are named, but not all, or not all with the same settings.

    Args:
        settings: `quantization_config` or the like.
        names: the source's tensors.
        num_layers: decoder layers; see `parse_expert_name`.
    """
    present: dict[_Place, set[int]] = defaultdict(set)
    for tensor in names:
        name = parse_expert_name(tensor.rpartition(".")[0] or tensor, num_layers)
        if name is not None and name.layer is not None:
            present[name.layer, name.family].add(name.expert)
    mixed = set()
    for entries in _fields(settings):
        named: dict[_Place, dict[int, str]] = defaultdict(dict)
        for entry, value in entries:
            expert = parse_expert_name(entry, num_layers)
            if expert is not None and expert.layer is not None:
                named[expert.layer, expert.family][expert.expert] = value
        mixed |= {place[0] for place, found in named.items() if _differ(place, found, present)}
    return sorted(mixed)


def _differ(place: _Place, found: dict[int, str], present: dict[_Place, set[int]]) -> bool:
    layer, family = place
    experts = present.get(place) or _members(layer, family, present)
    return len(set(found.values())) > 1 or bool(experts and not experts <= found.keys())


def _members(
    layer: int, family: tuple[tuple[str, ...], tuple[str, ...]], present: dict[_Place, set[int]]
) -> set[int]:
    """Experts of a layer, for an entry that names a whole expert and no module in it."""
    head, tail = family
    found = (
        experts
        for (other, (start, end)), experts in present.items()
        if other == layer and start == head and end[: len(tail)] == tail
    )
    return set().union(*found)


def _fields(value: Any) -> Iterator[list[tuple[str, str]]]:
    """The lists and the objects of settings: (module's name, what is set for it)."""
    if isinstance(value, dict):
        yield [(key, json.dumps(item, sort_keys=True)) for key, item in value.items()]
        for item in value.values():
            yield from _fields(item)
    elif isinstance(value, list):
        yield [(item, "") for item in value if isinstance(item, str)]
        for item in value:
            yield from _fields(item)
