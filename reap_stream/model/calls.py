"""What layers are called with and what they give, as trees whose leaves can be told apart.

A call is nested tuples, lists and dictionaries with tensors at their ends. Numbered in the order
in which they are met, the leaves of one call can be compared with those of another, and replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What a layer is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def leaves(tree: Any) -> list[Any]:
    """The ends of a tree, in order."""
    return list(_walk(tree))


def _walk(tree: Any) -> Iterator[Any]:
    if isinstance(tree, tuple | list):
        for entry in tree:
            yield from _walk(entry)
    elif isinstance(tree, Mapping):
        for entry in tree.values():
            yield from _walk(entry)
    else:
        yield tree


def with_leaves(tree: Any, values: Iterable[Any]) -> Any:
    """A tree of the same form with other leaves; its containers are new."""
    given = iter(values)
    return map_leaves(tree, lambda _: next(given))


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    """A tree of the same form, each leaf replaced by what `function` makes of it."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(entry, function) for entry in tree))
    if isinstance(tree, tuple):
        return tuple(map_leaves(entry, function) for entry in tree)
    if isinstance(tree, list):
        return [map_leaves(entry, function) for entry in tree]
    if isinstance(tree, MutableMapping):
        # A copy keeps what a family's own class of dictionary knows beside its entries.
        made = copy.copy(tree)
        for key, entry in tree.items():
            made[key] = map_leaves(entry, function)
        return made
    if isinstance(tree, Mapping):
        return {key: map_leaves(entry, function) for key, entry in tree.items()}
    return function(tree)


def shared_dicts(call: LayerCall) -> list[MutableMapping[Any, Any]]:
    """Dictionaries among the arguments: a layer can leave something in them for later layers."""
    values = (*call.args, *call.kwargs.values())
    return [value for value in values if isinstance(value, MutableMapping)]


def form(tree: Any) -> Any:
    """Something that two trees have in common if they differ in their leaves alone."""
    if isinstance(tree, tuple | list):
        return (type(tree).__name__, tuple(form(entry) for entry in tree))
    if isinstance(tree, Mapping):
        return (type(tree).__name__, tuple((key, form(entry)) for key, entry in tree.items()))
    return None
