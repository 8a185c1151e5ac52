"""The model around its decoder layers: embeddings, and what each layer is called with.

What can be known before is kept: masks and position embeddings for a few shapes of batches. What
a layer is called with beside them is taken from what earlier layers gave, or made anew by running
the model's own forward with the layers replaced by what they gave (see `handover`).
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from reap_stream.checkpoint.reader import Reader
from reap_stream.errors import UnsupportedError
from reap_stream.model.calls import LayerCall, leaves, map_leaves, with_leaves
from reap_stream.model.handover import Handover, Kind, Origin
from reap_stream.model.loading import load_parameters
from reap_stream.model.opened import OpenedModel
from reap_stream.model.outline import Outline, outline_at, plain_outline
from reap_stream.model.recording import Answer, Lookup, Recorded, Surroundings, looking_up
from reap_stream.model.row_lookup import row_lookup, row_weights
from reap_stream.model.transformers_api import materialize_buffers
from reap_stream.model.wiring import read_handover

# Rows come sorted by length, so batches of one shape are neighbours. Calls hold masks and position
# embeddings: those of all shapes would grow with the calibration data.
KEPT_SHAPES = 4

Shape = tuple[int, int]


class Skeleton:
    """Embeds tokens and makes the calls of the layers; holds no layer's weights.

    Embedding matrices are never loaded: only the rows of a batch's tokens are read.

    Args:
        opened: the model.
        reader: reads the weights.
        device: where the model's code around its layers runs.
        handover: what goes from layer to layer, if that was read already.
    """

    def __init__(
        self,
        opened: OpenedModel,
        reader: Reader,
        device: torch.device,
        handover: Handover | None = None,
    ) -> None:
        self.handover = handover or read_handover(opened.architecture, device)
        self._model = opened.architecture.model
        self._embedding = opened.architecture.embedding
        self._reader = reader
        self._device = device
        self._surroundings = Surroundings(opened.architecture)
        self._known: OrderedDict[Shape, list[Any]] = OrderedDict()
        materialize_buffers(self._model, device)
        self._lookups = self._find_lookups(opened)
        self._load_rest(opened)

    def _find_lookups(self, opened: OpenedModel) -> dict[int, Lookup]:
        names = {id(tensor): name for name, tensor in self._model.named_parameters()}
        lookups = {}
        for module in self._surroundings.embeddings().values():
            name = names[id(module.weight)]
            weights = row_weights(opened.tensor_map.feeds.get(name), module.weight.shape)
            if weights is not None:
                lookups[id(module.weight)] = row_lookup(
                    weights, self._reader, self._device, self._model.dtype
                )
            elif module is self._embedding:
                message = f"the embedding {name!r} is not a plain matrix of the checkpoint"
                raise UnsupportedError(message)
        return lookups

    def _load_rest(self, opened: OpenedModel) -> None:
        """Loads what stands outside the layers and takes part in the calls (norms, projections)."""
        base = self._surroundings.base
        inside = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
        wanted = [
            name
            for name, tensor in self._model.state_dict(keep_vars=True).items()
            if opened.architecture.layer_of(name) is None
            and id(tensor) not in self._lookups
            and id(tensor) in inside
        ]
        feeds = [opened.tensor_map.feeds[n] for n in wanted if n in opened.tensor_map.feeds]
        load_parameters(self._model, opened.keys, feeds, self._reader, self._device)

    def embed(self, tokens: np.ndarray[Any, Any]) -> tuple[torch.Tensor, list[LayerCall]]:
        """Runs the model around its layers.

        Args:
            tokens: int64 [rows, width] token ids.

        Returns:
            Hidden states before the first layer [rows, width, ...], and each layer's call as
            `calls` gives it.
        """
        ids = self._ids(tokens)
        calls = self._record(ids, {})
        return calls[0].hidden, self._calls(ids, calls)

    def calls(self, tokens: np.ndarray[Any, Any]) -> list[LayerCall]:
        """What each layer is called with, as far as tokens and their number tell.

        Args:
            tokens: int64 [rows, width] token ids.

        Returns:
            The calls of a batch of this shape; None stands for all that `call` must make.
        """
        return self._calls(self._ids(tokens), None)

    def call(
        self, layer: int, tokens: np.ndarray[Any, Any], given: Mapping[Origin, torch.Tensor]
    ) -> Recorded:
        """What a layer is called with on a batch.

        Args:
            layer: which layer.
            tokens: int64 [rows, width] token ids.
            given: what `handover.live` names for this layer, of this batch.
        """
        ids = self._ids(tokens)
        sources = self.handover.sources[layer]
        computed: list[Any] = []
        if self.handover.is_computed(layer):
            computed = leaves(self._record(ids, given, layer)[layer].tree)
        numbers = itertools.count()

        def fill(constant: Any) -> Any:
            source = sources[number := next(numbers)]
            if isinstance(source, Origin):
                # What is not given is not looked at, but may be asked for being there.
                return given[source] if source in given else self._empty(self._spec(source))
            if source is Kind.COMPUTED:
                return computed[number]
            return ids if source is Kind.TOKENS else constant

        hidden, args, kwargs = map_leaves(self._constants(ids)[layer], fill)
        return Recorded(hidden, LayerCall(args, kwargs))

    def last_hidden_state(
        self, tokens: np.ndarray[Any, Any], hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """What the model makes of its last layer's output: the hidden states its head sees.

        Args:
            tokens: int64 [rows, width] token ids.
            hidden_states: [rows, width, ...], the last layer's output.

        Returns:
            [rows, width, hidden].
        """
        last = len(self._surroundings.layers) - 1
        return self.finish(tokens, {Origin(last, 0): hidden_states})

    def finish(
        self, tokens: np.ndarray[Any, Any], given: Mapping[Origin, torch.Tensor]
    ) -> torch.Tensor:  # fmt: skip
        """What the model's head sees, made of what its layers gave.

        Args:
            tokens: int64 [rows, width] token ids.
            given: what a handover to the end names behind the last layer, of this batch.

        Returns:
            [rows, width, hidden].
        """
        return self._surroundings.finish(self._ids(tokens), self._answer(given), self._lookups)

    def look_up(self, embedding: Any, tokens: np.ndarray[Any, Any]) -> torch.Tensor:
        """Runs an embedding that has the model's matrix, of which the tokens' rows are read.

        Args:
            embedding: the model's module or a copy of it.
            tokens: int64 [rows, width] token ids.

        Returns:
            [rows, width, hidden].
        """
        own = self._lookups[id(self._embedding.weight)]
        with looking_up({id(embedding.weight): own}), torch.no_grad():
            embedded: torch.Tensor = embedding(self._ids(tokens))
        return embedded

    def _calls(self, ids: torch.Tensor, recorded: list[Recorded] | None) -> list[LayerCall]:
        calls = []
        for layer, tree in enumerate(self._constants(ids, recorded)):
            sources = self.handover.sources[layer]
            values = [
                ids if source is Kind.TOKENS else leaf
                for source, leaf in zip(sources, leaves(tree), strict=True)
            ]
            _, args, kwargs = with_leaves(tree, values)
            calls.append(LayerCall(args, kwargs))
        return calls

    def _constants(self, ids: torch.Tensor, recorded: list[Recorded] | None = None) -> list[Any]:
        """Each layer's call for batches of this shape, None in place of all that varies."""
        shape = (ids.shape[0], ids.shape[1])
        if shape not in self._known:
            # Any tokens do, and those of one id read one row of the embedding matrix.
            recorded = recorded or self._record(torch.zeros_like(ids), {})
            self._known[shape] = [
                self._without_variables(layer, call.tree) for layer, call in enumerate(recorded)
            ]
        self._known.move_to_end(shape)
        while len(self._known) > KEPT_SHAPES:
            self._known.popitem(last=False)
        return self._known[shape]

    def _without_variables(self, layer: int, tree: Any) -> Any:
        sources = iter(self.handover.sources[layer])
        return map_leaves(tree, lambda leaf: leaf if next(sources) is Kind.CONSTANT else None)

    def _record(
        self, ids: torch.Tensor, given: Mapping[Origin, torch.Tensor], last: int | None = None
    ) -> list[Recorded]:
        """Runs the model with layers that answer what they gave, or with stand-ins."""
        return self._surroundings.record(ids, self._answer(given), self._lookups, last)

    def _answer(self, given: Mapping[Origin, torch.Tensor]) -> Answer:
        def answer(index: int, recorded: Recorded) -> Any:
            outline = self._outline(index, recorded)
            outputs = [
                given.get(Origin(index, number), self._stand_in(number, spec, recorded))
                for number, spec in enumerate(outline.outputs)
            ]
            return outline.give(outputs, recorded.call)

        return answer

    def _outline(self, index: int, recorded: Recorded) -> Outline:
        known = outline_at(self.handover.outlines, index)
        return known or plain_outline(recorded.hidden, in_tuple=False)

    def _stand_in(self, number: int, spec: Any, recorded: Recorded) -> Any:
        if number == 0:
            return recorded.hidden.view_as(recorded.hidden)
        return self._empty(spec)

    def _spec(self, origin: Origin) -> Any:
        return self.handover.outlines[origin.layer].outputs[origin.number]

    def _empty(self, spec: Any) -> Any:
        if not isinstance(spec, torch.Tensor):
            return spec
        return torch.zeros((), dtype=spec.dtype, device=self._device).expand(spec.shape)

    def _ids(self, tokens: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(tokens)).to(self._device)
