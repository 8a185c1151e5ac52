"""Runs the model's own forward around its layers, each layer replaced by an answer.

So position embeddings, masks and whatever else a family passes its layers, or does to what they
return, are the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from reap_stream.errors import UnsupportedError
from reap_stream.model.architecture import Architecture
from reap_stream.model.calls import LayerCall, map_leaves
from reap_stream.model.own_code import own_code

Lookup = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [...] → rows of an embedding matrix [..., width]."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One call of a layer, as the model makes it: hidden states and the rest."""

    hidden: torch.Tensor
    call: LayerCall

    @property
    def tree(self) -> tuple[Any, ...]:
        """All of it as one tree; the hidden states are its first leaf."""
        return (self.hidden, self.call.args, dict(self.call.kwargs))


Answer = Callable[[int, Recorded], Any]
"""Acts as a layer: its number and its call → what the model gets back."""


class _Stop(BaseException):  # Past any handler in the model's code.
    """Ends the model's forward once the last layer that matters was reached."""


class Surroundings:
    """A model's code around its decoder layers.

    Attributes:
        base: the module that embeds tokens and runs the layers, which take part in it.
        layers: the layers, in order.
    """

    def __init__(self, architecture: Architecture) -> None:
        model = architecture.model
        self.base: nn.Module = model.get_submodule(architecture.layers_path.rpartition(".")[0])
        self.layers: list[nn.Module] = list(
            model.get_submodule(architecture.layers_path).children()
        )
        self._name = architecture.name

    def embeddings(self) -> dict[str, nn.Embedding]:
        """The embedding matrices outside the layers, by their dotted path in `base`."""
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        return {
            path: module
            for path, module in self.base.named_modules()
            if isinstance(module, nn.Embedding) and id(module) not in inside
        }

    def record(
        self,
        ids: torch.Tensor,
        answer: Answer,
        lookups: Mapping[int, Lookup],
        last: int | None = None,
    ) -> list[Recorded]:
        """Runs the model on tokens and gives the calls of its layers.

        Args:
            ids: int64 [rows, width] token ids.
            answer: acts as the layers before `last`.
            lookups: ``id`` of an embedding matrix → where its rows come from.
            last: the layer at whose call the run ends; None: the model's last.

        Raises:
            UnsupportedError: layers are not called once each, in order.
        """
        calls: list[Recorded] = []
        end = len(self.layers) - 1 if last is None else last

        def called(index: int, hidden: torch.Tensor, call: LayerCall) -> Any:
            if index != len(calls):
                message = f"{self._name} calls layer {index} where layer {len(calls)} is expected"
                raise UnsupportedError(message)
            # A layer may change what it is given: the record shows the call as it was made.
            calls.append(Recorded(hidden, LayerCall(*map_leaves((call.args, call.kwargs), _same))))
            if index == end:
                raise _Stop
            return answer(index, Recorded(hidden, call))

        try:
            self._run(ids, called, lookups)
        except _Stop:
            return calls
        message = f"{self._name} calls {len(calls)} of its {len(self.layers)} layers"
        raise UnsupportedError(message)

    def finish(
        self, ids: torch.Tensor, answer: Answer, lookups: Mapping[int, Lookup]
    ) -> torch.Tensor:
        """Runs the model on tokens to its end and gives what its head sees.

        Args:
            ids: int64 [rows, width] token ids.
            answer: acts as the layers, the last of them too.
            lookups: as `record` takes them.

        Returns:
            The last hidden states [rows, width, hidden].
        """

        def called(index: int, hidden: torch.Tensor, call: LayerCall) -> Any:
            return answer(index, Recorded(hidden, call))

        last: torch.Tensor = self._run(ids, called, lookups).last_hidden_state
        return last

    def _run(self, ids: torch.Tensor, called: Any, lookups: Mapping[int, Lookup]) -> Any:
        for index, layer in enumerate(self.layers):
            layer.forward = _forward(called, index)
        try:
            with own_code(self._name, UnsupportedError), looking_up(lookups), torch.no_grad():
                return self.base(input_ids=ids, use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward


def _same(leaf: Any) -> Any:
    return leaf


def _forward(called: Callable[[int, torch.Tensor, LayerCall], Any], index: int) -> Any:
    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return called(index, hidden_states, LayerCall(args, kwargs))

    return forward


def looking_up(lookups: Mapping[int, Lookup]) -> TorchFunctionMode:
    """A context in which embeddings take their rows from `lookups`."""
    return _Lookups(lookups)


class _Lookups(TorchFunctionMode):
    """Gives rows of embedding matrices that are not in memory."""

    def __init__(self, lookups: Mapping[int, Lookup]) -> None:
        super().__init__()
        self._lookups = lookups

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.embedding:
            given = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            lookup = self._lookups.get(id(given["weight"]))
            if lookup is not None:
                return lookup(given["input"])
        # Some models send ids to the device of the matrix, which is on none.
        if func is torch.Tensor.to and args[1:] == (torch.device("meta"),):
            return args[0]
        return func(*args, **(kwargs or {}))
