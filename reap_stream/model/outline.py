"""What a layer returns, leaves behind for later layers, and looks at, learnt without weights.

The layer's own code is run on the meta device, where tensors have shapes and no values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from reap_stream.errors import ReapStreamError, UnsupportedError
from reap_stream.model.calls import LayerCall, leaves, map_leaves, shared_dicts, with_leaves

_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)


@dataclass(frozen=True, slots=True)
class Outline:
    """The form of what a layer gives.

    Attributes:
        returned: what it returns, meta tensors at the ends.
        left: what it leaves in dictionaries among its arguments: (which of them, key, entry).
        used: numbers of the leaves of (hidden states, args, kwargs) that it looks at; None: all.
        is_plain: it gives hidden states like those it got; whatever else it may return, the model
            takes no notice of.
    """

    returned: Any
    left: tuple[tuple[int, Any, Any], ...] = ()
    used: frozenset[int] | None = None
    is_plain: bool = False

    @property
    def outputs(self) -> list[Any]:
        """The leaves of what the layer gives: those it returns, then those it leaves."""
        return [*leaves(self.returned), *leaves([entry for _, _, entry in self.left])]

    def collect(self, returned: Any, call: LayerCall) -> list[Any]:
        """The leaves of what a run of the layer gave, in the order of `outputs`."""
        if self.is_plain:
            return [returned[0] if isinstance(returned, tuple) else returned]
        dicts = shared_dicts(call)
        entries = [dicts[number][key] for number, key, _ in self.left]
        return [*leaves(returned), *leaves(entries)]

    def give(self, outputs: Sequence[Any], call: LayerCall) -> Any:
        """Acts as the layer: leaves behind what it does and returns what it does."""
        dicts = shared_dicts(call)
        given = iter(outputs)
        returned = with_leaves(self.returned, given)
        for number, key, entry in self.left:
            dicts[number][key] = with_leaves(entry, given)
        return returned


def plain_outline(hidden: torch.Tensor, *, in_tuple: bool) -> Outline:
    """Of a layer that returns hidden states like those it got, and nothing else."""
    made = torch.empty_like(hidden, device="meta")
    return Outline((made,) if in_tuple else made, is_plain=True)


def outline_at(outlines: Sequence[Outline], layer: int) -> Outline | None:
    """What a layer gives: of the model's last nothing is learnt, it gives what the one before does.

    None where that is not known either, because the model has one layer.
    """
    if layer < len(outlines):
        return outlines[layer]
    return outlines[-1] if outlines else None


def trace_outline(layer: nn.Module, hidden: torch.Tensor, call: LayerCall) -> Outline:
    """Runs a layer without weights.

    Args:
        layer: the layer; its routed experts already return something of the right shape.
        hidden: hidden states, for their shape and dtype.
        call: what the model calls the layer with.

    Raises:
        UnsupportedError: it does not run on tensors without values.
    """
    seen: set[int] = set()
    tree = (hidden, call.args, dict(call.kwargs))
    numbered = iter(range(len(leaves(tree))))
    watched = map_leaves(tree, lambda leaf: _watch(leaf, next(numbered), seen))
    inner = LayerCall(watched[1], watched[2])
    before = [dict(entries) for entries in shared_dicts(inner)]
    replaced = vars(layer).pop("forward", None)
    try:
        with torch.inference_mode(mode=False), torch.no_grad():
            returned = functional_call(
                layer, _on_meta(layer), (watched[0], *inner.args), watched[2]
            )
    except (*_FAILURES, ReapStreamError) as error:
        message = f"{type(layer).__name__} does not run on tensors without values: {error}"
        raise UnsupportedError(message) from error
    finally:
        if replaced is not None:
            layer.forward = replaced
    left = _left(before, inner)
    given = leaves([returned, [entry for _, _, entry in left]])
    # What is passed on as it came is needed, whether or not the layer looks at it.
    seen.update(leaf.number for leaf in given if isinstance(leaf, _Watched))
    return Outline(
        map_leaves(returned, _plain),
        tuple((number, key, map_leaves(entry, _plain)) for number, key, entry in left),
        frozenset(seen),
    )


def _left(before: Sequence[Mapping[Any, Any]], call: LayerCall) -> list[tuple[int, Any, Any]]:
    found = []
    for number, (old, new) in enumerate(zip(before, shared_dicts(call), strict=True)):
        for key, entry in new.items():
            if key not in old or old[key] is not entry:
                found.append((number, key, entry))
    return found


def _on_meta(layer: nn.Module) -> dict[str, torch.Tensor]:
    named = (*layer.named_parameters(), *layer.named_buffers())
    return {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in named
        if not tensor.is_meta
    }


class _Watched(torch.Tensor):
    """A tensor that notes that it was used."""

    number: int
    seen: set[int]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in leaves([args, kwargs or {}]):
            if isinstance(leaf, _Watched):
                leaf.seen.add(leaf.number)
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - torch documents no other way
            return func(*args, **(kwargs or {}))


def _watch(leaf: Any, number: int, seen: set[int]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    made = torch.empty_like(leaf, device="meta").as_subclass(_Watched)
    made.number, made.seen = number, seen
    return made


def _plain(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - torch documents no other way
        return torch.empty_like(leaf, device="meta").as_subclass(torch.Tensor)
