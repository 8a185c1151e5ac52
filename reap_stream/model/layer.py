"""One decoder layer at a time: its dense part as parameters, its experts as bytes.

    with streamed.layer(3, statistics=acc) as layer:      # reads layer 3
        hidden = layer.run(hidden, call, tokens)          # as often as there are batches

When the block ends, the layer's parameters are gone. Reading layer i + 1 ahead is a hint to the
operating system's cache, so it costs none of the memory that is promised to be bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from reap_stream.checkpoint.reader import Reader
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.model.architecture import Architecture
from reap_stream.model.experts import BatchTokens, RoutedExperts, Statistics
from reap_stream.model.loading import load_parameters, release_parameters
from reap_stream.model.opened import OpenedModel
from reap_stream.model.roles import Feed, TensorMap
from reap_stream.model.skeleton import LayerCall
from reap_stream.model.store import MOVING_SLOTS, ExpertStore
from reap_stream.model.transformers_api import attach_experts, set_tensor

RawSink = Callable[[TensorRef, "np.ndarray[Any, Any]"], None]


@dataclass(frozen=True, slots=True)
class LayerFeeds:
    """What one layer is made of.

    Attributes:
        dense: feeds of everything but the routed experts.
        experts: experts parameter leaf → feed; empty in a dense layer.
        dims: experts parameter leaf → dimension of the experts.
    """

    dense: tuple[Feed, ...]
    experts: dict[str, Feed]
    dims: dict[str, int]


def layer_feeds(architecture: Architecture, tensor_map: TensorMap) -> list[LayerFeeds]:
    """Divides a model's feeds among its layers, in order."""
    dense: list[list[Feed]] = [[] for _ in range(architecture.num_layers)]
    experts: list[dict[str, Feed]] = [{} for _ in range(architecture.num_layers)]
    dims: list[dict[str, int]] = [{} for _ in range(architecture.num_layers)]
    for target, feed in tensor_map.feeds.items():
        layer = architecture.layer_of(target)
        if layer is None:
            continue
        module, _, leaf = target.rpartition(".")
        if module == architecture.experts_paths.get(layer) and target in architecture.sliced:
            experts[layer][leaf] = feed
            dims[layer][leaf] = architecture.sliced[target]
        else:
            dense[layer].append(feed)
    return [
        LayerFeeds(tuple(d), e, n) for d, e, n in zip(dense, experts, dims, strict=True)
    ]  # fmt: skip


class StreamedLayer:
    """A decoder layer whose weights are in memory; see `StreamedModel.layer`."""

    def __init__(
        self, module: nn.Module, store: ExpertStore | None, runner: RoutedExperts | None
    ) -> None:
        self._module = module
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
        if self.runner is not None:
            self.runner.batch = tokens
        with torch.inference_mode():
            result = self._module(hidden_states, *call.args, **call.kwargs)
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output


class StreamedModel:
    """A model of which one layer at a time is in memory.

    Args:
        model: the opened model.
        reader: reads the bytes.
        device: where layers run.
        expert_slots: experts of a layer held in memory at a time; None: all.
        grouped: run experts in grouped matrix products.
    """

    def __init__(
        self,
        model: OpenedModel,
        reader: Reader,
        device: torch.device,
        *,
        expert_slots: int | None = None,
        grouped: bool = False,
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
        self._arena: torch.Tensor | None = None

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
        store = ExpertStore(feeds.experts, feeds.dims, count, self._keys, self._reader)
        slots = min(self._slots, count)
        nbytes = slots * store.layout.nbytes
        if self._arena is None or self._arena.numel() < nbytes:
            self._arena = None
            pinned = self._device.type == "cuda"
            self._arena = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        store.open(self._arena, slots)
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
                attach_experts(module, runner)
            yield StreamedLayer(model.get_submodule(path), store, runner)
        finally:
            if runner is not None:
                attach_experts(model.get_submodule(self._architecture.experts_paths[index]), None)
            if store is not None:
                store.close()
            release_layer(model, path)

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
        copy_sliced(self._architecture.model, model, path, self._architecture.sliced, picked)
        assert full.store is not None
        runner = RoutedExperts(
            module,
            full.store,
            reduced.routing.experts_per_token,
            kept=kept,
            grouped=self._grouped,
        )
        attach_experts(module, runner)
        try:
            yield StreamedLayer(model.get_submodule(path), full.store, runner)
        finally:
            attach_experts(module, None)
            release_layer(model, path)


def feed_refs(feeds: Sequence[Feed]) -> Iterator[TensorRef]:
    """The tensors that feeds are made of."""
    for feed in feeds:
        for _, weights in feed.groups:
            for weight in weights:
                yield from weight.parts.values()


def release_layer(model: Any, path: str) -> None:
    """Frees every parameter and persistent buffer of a layer that holds data."""
    state = model.get_submodule(path).state_dict()
    names = [f"{path}.{name}" for name, tensor in state.items() if not tensor.is_meta]
    release_parameters(model, names)


def copy_sliced(
    source: Any, target: Any, path: str, sliced: Mapping[str, int], picked: torch.Tensor
) -> None:
    """Gives `target`'s layer the parameters of `source`'s, with only the picked experts' rows."""
    for name, tensor in source.get_submodule(path).state_dict().items():
        full = f"{path}.{name}"
        if tensor.is_meta:
            continue
        dim = sliced.get(full)
        set_tensor(target, full, tensor if dim is None else tensor.index_select(dim, picked))
