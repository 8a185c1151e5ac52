"""One decoder layer at a time: its dense part as parameters, its experts as bytes.

    with streamed.layer(3, statistics=acc) as layer:      # reads layer 3
        hidden = layer.run(hidden, call, tokens)          # as often as there are batches

When the block ends, the layer's parameters are gone. Reading layer i + 1 ahead is a hint to the
operating system's cache, so it costs none of the memory that is promised to be bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from reap_stream.checkpoint.reader import Reader
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.checkpoint.token_tables import remapped
from reap_stream.errors import ForwardError
from reap_stream.model.adapters import attach_experts
from reap_stream.model.architecture import Architecture
from reap_stream.model.arena import Arena
from reap_stream.model.calls import LayerCall
from reap_stream.model.experts import BatchTokens, RoutedExperts, Statistics
from reap_stream.model.feeds import feed_refs, layer_feeds
from reap_stream.model.hash_routing import token_tables
from reap_stream.model.loading import load_parameters, release_parameters
from reap_stream.model.opened import OpenedModel
from reap_stream.model.outline import Outline
from reap_stream.model.own_code import own_code
from reap_stream.model.recording import Lookup, looking_up
from reap_stream.model.row_lookup import row_lookup
from reap_stream.model.store import MOVING_SLOTS, ExpertStore
from reap_stream.model.transformers_api import get_tensor, set_tensor

RawSink = Callable[[TensorRef, "np.ndarray[Any, Any]"], None]


class StreamedLayer:
    """A decoder layer whose weights are in memory; see `StreamedModel.layer`."""

    def __init__(
        self,
        path: str,
        module: nn.Module,
        store: ExpertStore | None,
        runner: RoutedExperts | None,
        lookups: Mapping[int, Lookup],
    ) -> None:
        self._path = path
        self._module = module
        self._lookups = lookups
        self.store = store
        self.runner = runner

    def run(
        self, hidden_states: torch.Tensor, call: LayerCall, tokens: BatchTokens
    ) -> torch.Tensor:
        """Runs the layer on one batch.

        Args:
            hidden_states: [rows, width, hidden].
            call: what the model calls this layer with.
            tokens: which of the rows × width tokens are real, and whose they are.

        Returns:
            Hidden states after the layer, of the same shape.
        """
        returned = self._run(hidden_states, call, tokens)
        output: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
        return output

    def run_whole(
        self, hidden_states: torch.Tensor, call: LayerCall, tokens: BatchTokens, outline: Outline
    ) -> list[Any]:
        """Runs the layer on one batch; gives all that later layers may need of it.

        Args:
            hidden_states: [rows, width, ...].
            call: what the model calls this layer with; may hold dictionaries that the layer fills.
            tokens: which of the rows × width tokens are real, and whose they are.
            outline: the form of what the layer gives.

        Returns:
            The leaves of `outline.outputs`, the hidden states first.
        """
        return outline.collect(self._run(hidden_states, call, tokens), call)

    def _run(self, hidden_states: torch.Tensor, call: LayerCall, tokens: BatchTokens) -> Any:
        if self.runner is not None:
            self.runner.batch = tokens
        failing = own_code(self._path, ForwardError)
        with failing, torch.inference_mode(), looking_up(self._lookups):
            return self._module(hidden_states, *call.args, **call.kwargs)


class StreamedModel:
    """A model of which one layer at a time is in memory.

    Args:
        model: the opened model.
        reader: reads the bytes.
        device: where layers run.
        expert_slots: experts of a layer held in memory at a time; None: all.
        grouped: run experts in grouped matrix products.
        arena: memory for experts, shared with others that do not run at the same time.
    """

    def __init__(
        self,
        model: OpenedModel,
        reader: Reader,
        device: torch.device,
        *,
        expert_slots: int | None = None,
        grouped: bool = False,
        arena: Arena | None = None,
    ) -> None:
        architecture = model.architecture
        self._architecture = architecture
        self._keys = model.keys
        self._reader = reader
        self._device = device
        self._grouped = grouped
        self.feeds = layer_feeds(architecture, model.tensor_map)
        wanted = architecture.num_experts if expert_slots is None else expert_slots
        self._slots = max(1 + MOVING_SLOTS, wanted)
        self._arena = Arena(device) if arena is None else arena

    def prefetch(self, index: int) -> None:
        """Asks the operating system to bring a layer's bytes into its cache."""
        if index < len(self.feeds):
            feeds = (*self.feeds[index].dense, *self.feeds[index].experts.values())
            self._reader.prefetch(list(feed_refs(feeds)))

    def open_store(self, index: int) -> ExpertStore | None:
        """The routed experts of a layer, read into the shared arena; None in a dense layer."""
        feeds = self.feeds[index]
        if not feeds.experts:
            return None
        count = self._architecture.num_experts
        store = ExpertStore(
            feeds.experts, feeds.dims, count, self._keys, self._reader, each=feeds.each
        )
        slots = min(self._slots, count)
        store.open(self._arena.take(slots * store.layout.nbytes), slots)
        return store

    @contextmanager
    def layer(
        self, index: int, *, statistics: Statistics | None = None, sink: RawSink | None = None
    ) -> Iterator[StreamedLayer]:
        """Reads a layer, yields it, and forgets it.

        Args:
            index: which layer.
            statistics: is shown the outputs of the layer's experts.
            sink: is shown the raw bytes of the layer's dense tensors before they are dropped.
        """
        model = self._architecture.model
        path = f"{self._architecture.layers_path}.{index}"
        store = self.open_store(index)
        runner = None
        try:
            load_parameters(
                model, self._keys, self.feeds[index].dense, self._reader, self._device, sink
            )
            if store is not None:
                module = model.get_submodule(self._architecture.experts_paths[index])
                runner = RoutedExperts(
                    module,
                    store,
                    self._architecture.routing.experts_per_token,
                    statistics=statistics,
                    grouped=self._grouped,
                )
                attach_experts(model, self._architecture.experts_paths[index], runner)
            lookups = self._lookups(index, model)
            yield StreamedLayer(path, model.get_submodule(path), store, runner, lookups)
        finally:
            if runner is not None:
                attach_experts(model, self._architecture.experts_paths[index], None)
            if store is not None:
                store.close()
            release_layer(model, path)

    def _lookups(self, index: int, model: Any) -> dict[int, Lookup]:
        """Where the rows of a layer's tables come from; `model` is the model or a pruned one."""
        return {
            id(get_tensor(model, name)): row_lookup(
                weights, self._reader, self._device, model.dtype
            )
            for name, weights in self.feeds[index].tables.items()
        }

    @contextmanager
    def pruned_layer(
        self,
        index: int,
        full: StreamedLayer,
        reduced: Architecture,
        kept: Sequence[int],
    ) -> Iterator[StreamedLayer]:
        """The same layer with only its kept experts, sharing the full one's weights.

        Args:
            index: which layer.
            full: the layer as `layer` yielded it.
            reduced: the architecture with as many experts as are kept.
            kept: numbers of the kept experts, ascending.
        """
        model, path = reduced.model, f"{reduced.layers_path}.{index}"
        module = model.get_submodule(reduced.experts_paths[index])
        picked = torch.tensor(list(kept), device=self._device)
        copy_sliced(self._architecture, model, path, picked)
        assert full.store is not None
        runner = RoutedExperts(
            module,
            full.store,
            reduced.routing.experts_per_token,
            kept=kept,
            grouped=self._grouped,
        )
        attach_experts(model, reduced.experts_paths[index], runner)
        try:
            lookups = self._lookups(index, model)
            yield StreamedLayer(path, model.get_submodule(path), full.store, runner, lookups)
        finally:
            attach_experts(model, reduced.experts_paths[index], None)
            release_layer(model, path)


def release_layer(model: Any, path: str) -> None:
    """Frees every parameter and persistent buffer of a layer that holds data."""
    state = model.get_submodule(path).state_dict()
    names = [f"{path}.{name}" for name, tensor in state.items() if not tensor.is_meta]
    release_parameters(model, names)


def copy_sliced(source: Architecture, target: Any, path: str, picked: torch.Tensor) -> None:
    """Gives `target`'s layer the parameters of `source`'s, with only the picked experts' entries.

    Args:
        source: the model that is pruned.
        target: a model of as many experts as are picked.
        path: dotted path of the layer.
        picked: int64 [kept] numbers of the experts.
    """
    tables = token_tables(source)
    for name, tensor in source.model.get_submodule(path).state_dict().items():
        full = f"{path}.{name}"
        if tensor.is_meta:
            continue
        if full in tables:
            table = remapped(tensor.cpu().long().numpy(), picked.tolist(), source.num_experts)
            set_tensor(target, full, torch.from_numpy(table).to(tensor))
            continue
        dim = source.sliced.get(full)
        if dim is None:
            set_tensor(target, full, tensor)
            continue
        entries = _entries(picked, tensor.shape[dim], source.extras.get(full, 0), source)
        set_tensor(target, full, tensor.index_select(dim, entries))


def _entries(picked: torch.Tensor, length: int, extra: int, source: Architecture) -> torch.Tensor:
    """Positions of the picked experts' entries, and of those behind all experts."""
    each = (length - extra) // source.num_experts
    own = picked[:, None] * each + torch.arange(each, device=picked.device)
    behind = torch.arange(length - extra, length, device=picked.device)
    return torch.cat([own.flatten(), behind])
