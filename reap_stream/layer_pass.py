"""One pass over the layers: run, score, hand over; and where it can be taken up again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.errors import ForwardError
from reap_stream.forward import ForwardPass
from reap_stream.model.architecture import Architecture
from reap_stream.model.layer import StreamedLayer
from reap_stream.preparation import Preparation
from reap_stream.ranks.sums import sum_over_ranks
from reap_stream.scoring.accumulator import SaliencyAccumulator
from reap_stream.scoring.saliency import LayerStats
from reap_stream.snapshots import Snapshots

# With more outputs lost than this the scores say little, and something is wrong with the model.
_MAX_LOST_SHARE = 0.1

Resident = Callable[[TensorRef], "np.ndarray[Any, Any] | None"]


class LayerSink(Protocol):
    """What receives finished layers."""

    def is_done(self, index: int) -> bool:
        """Whether an earlier run finished the layer."""
        ...

    def take(self, ref: TensorRef, raw: np.ndarray[Any, Any]) -> None:
        """Is shown the raw bytes of each dense tensor of a layer that is not done."""
        ...

    def finish(
        self, index: int, stats: LayerStats | None, resident: Resident, non_finite: int = 0
    ) -> None:
        """A layer was run; `stats` is None in a layer without routed experts."""
        ...

    def kept(self, index: int) -> tuple[int, ...]:
        """The kept experts of a finished layer, for running later layers on it."""
        ...

    def drain(self) -> None:
        """Waits until finished layers are on the disk."""
        ...


class LayerPass:
    """Runs layers in order up to the last one with routed experts that is scored.

    Args:
        ready: what was prepared.
        forward: the hidden states and the layers.
        sink: receives finished layers.
        snapshots: where hidden states are saved.
        reduced: gives a layer's architecture with as many experts as are kept, where later layers
            see pruned ones; None where they see the original model.
    """

    def __init__(
        self,
        ready: Preparation,
        forward: ForwardPass,
        sink: LayerSink,
        snapshots: Snapshots,
        reduced: Callable[[int], Architecture] | None = None,
    ) -> None:
        self._ready = ready
        self._forward = forward
        self._sink = sink
        self._snapshots = snapshots
        self._reduced = reduced

    @property
    def num_layers(self) -> int:
        """Layers that must run."""
        return self._ready.num_layers

    def run(self, done: Callable[[int], None] = lambda _: None) -> None:
        """Runs every layer that is left.

        Args:
            done: is told of each layer that was run and that nothing will read again.
        """
        if all(self._sink.is_done(index) for index in range(self.num_layers)):
            return
        first = self._snapshots.restore(self._forward)
        # A snapshot ahead of the journal (a journal cut short by a power loss) is of no use: the
        # layers before it must be written too.
        if not 0 < first < self.num_layers or not all(map(self._sink.is_done, range(first))):
            first = 0
            self._forward.embed()
        self._forward.skip(first)
        for index in range(first, self.num_layers):
            self._run_layer(index)
            done(index)
            if self._snapshots.is_due() and index + 1 < self.num_layers:
                self._sink.drain()
                self._snapshots.save(self._forward, index + 1)

    def _run_layer(self, index: int) -> None:
        architecture = self._ready.model.architecture
        is_moe, done = index in self._ready.moe_layers, self._sink.is_done(index)
        accumulator = None
        if is_moe and not done:
            accumulator = SaliencyAccumulator(
                architecture.num_experts, len(self._ready.corpus.sources), self._ready.device
            )
        sink = None if done else self._sink.take
        with self._forward.layer(index, accumulator, sink) as layer:
            onward = index + 1 < self.num_layers
            prune_first = is_moe and self._reduced is not None
            if not (done and prune_first):
                runs_again = prune_first and onward
                self._forward.advance(
                    index, layer, store=onward and not prune_first, counted=not runs_again
                )
            if not done:
                started = time.monotonic()
                self._finish(index, layer, accumulator)
                self._forward.times.writing += time.monotonic() - started
            if prune_first and onward:
                self._advance_pruned(index, layer)

    def _finish(
        self, index: int, layer: StreamedLayer, accumulator: SaliencyAccumulator | None
    ) -> None:
        if accumulator is None or layer.store is None:
            self._sink.finish(index, None, lambda _: None)
            return
        stats, lost = sum_over_ranks(self._ready.ranks, *accumulator.finish())
        routed = int(stats.tokens.sum())
        if lost > _MAX_LOST_SHARE * (routed + lost):
            message = (
                f"layer {index}: {lost} of {routed + lost} expert outputs are not finite: the weights "
                "are damaged, or need --compute-dtype float32 (start anew with --overwrite)"
            )
            raise ForwardError(message)
        stats.check(f"layer {index}")
        self._sink.finish(index, stats, layer.store.resident, lost)

    def _advance_pruned(self, index: int, layer: StreamedLayer) -> None:
        assert self._reduced is not None
        kept = self._sink.kept(index)
        with self._forward.pruned_layer(index, layer, self._reduced(index), kept) as pruned:
            self._forward.advance(index, pruned)
