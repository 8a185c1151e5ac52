"""The pass: calibration tokens through the model, one layer after the other.

    with ForwardPass(...) as forward:
        forward.embed()
        for index in range(num_layers):
            with forward.layer(index, accumulator) as layer:
                forward.advance(index, layer)

Hidden states of all tokens are held once and replaced batch by batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from typing_extensions import Self

from reap_stream import _native
from reap_stream.calibration.activations import HiddenStates
from reap_stream.calibration.batches import Batch, pad, plan_batches, unpad, valid_mask
from reap_stream.calibration.corpus import Corpus
from reap_stream.checkpoint.reader import Reader
from reap_stream.errors import ReapStreamError
from reap_stream.model.architecture import Architecture
from reap_stream.model.experts import BatchTokens
from reap_stream.model.layer import RawSink, StreamedLayer, StreamedModel
from reap_stream.model.skeleton import Skeleton
from reap_stream.preparation import Preparation
from reap_stream.progress import Progress
from reap_stream.scoring.accumulator import SaliencyAccumulator


@dataclass(slots=True)
class ForwardTimes:
    """Seconds spent on the parts of a pass.

    Attributes:
        reading: reading and decoding layers; their dense tensors are written meanwhile.
        running: running layers on the calibration tokens.
        writing: choosing and writing experts.
    """

    reading: float = 0.0
    running: float = 0.0
    writing: float = 0.0


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A batch as the layers want it."""

    batch: Batch
    ids: np.ndarray[Any, Any]
    info: BatchTokens = field(repr=False)


class ForwardPass:
    """Calibration rows on their way through a model; see the module's text.

    Args:
        ready: model, calibration rows, device and memory.
        reader: reads the weights.
        spill_path: where hidden states go if they do not stay in memory.
        progress: is told of layers and tokens.
    """

    def __init__(
        self, ready: Preparation, reader: Reader, *, spill_path: Path, progress: Progress
    ) -> None:
        self.times = ForwardTimes()
        model, corpus, memory = ready.model, ready.corpus, ready.memory
        self._corpus = corpus
        self._device = ready.device
        self._progress = progress
        self._skeleton = Skeleton(model, reader, ready.device)
        self._streamed = StreamedModel(
            model,
            reader,
            ready.device,
            expert_slots=memory.expert_slots,
            grouped=memory.grouped,
        )
        lengths = [len(row.tokens) for row in corpus.rows]
        batches = plan_batches(lengths, memory.batch_tokens)
        self._batches = [_lay_out(batch, corpus, ready.device) for batch in batches]
        hidden = int(model.architecture.model.get_input_embeddings().weight.shape[-1])
        dtype = model.architecture.model.dtype
        path = spill_path if memory.spill else None
        self.states = HiddenStates.create(corpus.num_tokens, hidden, dtype, spill_path=path)

    def __enter__(self) -> Self:
        """Nothing more to open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Gives hidden states back."""
        self.states.close()

    def skip(self, layers: int) -> None:
        """Counts layers that an earlier run finished."""
        self._progress.skip(layers, self._corpus.num_tokens)

    def embed(self) -> None:
        """Puts the embedded tokens into the hidden states."""
        for tokens in self._batches:
            hidden, _ = self._skeleton.embed(tokens.ids)
            self.states.store(tokens.batch.start, unpad(hidden, tokens.batch))

    @contextmanager
    def layer(
        self,
        index: int,
        accumulator: SaliencyAccumulator | None = None,
        sink: RawSink | None = None,
    ) -> Iterator[StreamedLayer]:
        """Reads a layer and asks for the next one meanwhile; see `StreamedModel.layer`."""
        self._progress.layer(index)
        started = time.monotonic()
        with self._streamed.layer(index, statistics=accumulator, sink=sink) as layer:
            self.times.reading += time.monotonic() - started
            self._streamed.prefetch(index + 1)
            yield layer
        _native.trim_memory()

    @contextmanager
    def pruned_layer(
        self, index: int, full: StreamedLayer, reduced: Architecture, kept: Sequence[int]
    ) -> Iterator[StreamedLayer]:
        """The layer with its kept experts only; see `StreamedModel.pruned_layer`."""
        with self._streamed.pruned_layer(index, full, reduced, kept) as layer:
            yield layer

    def advance(
        self, index: int, layer: StreamedLayer, *, store: bool = True, counted: bool = True
    ) -> None:
        """Runs a layer on all tokens.

        Args:
            index: which layer.
            layer: the layer.
            store: replace the hidden states by the layer's outputs; False: look on only.
            counted: these tokens are what the progress bar counts for this layer.

        Raises:
            ReapStreamError: the layer has routed experts but did not call them.
        """
        started = time.monotonic()
        for tokens in self._batches:
            call = self._skeleton.calls(tokens.ids)[index]
            flat = self.states.load(tokens.batch.start, tokens.batch.stop)
            hidden = pad(flat, tokens.batch).to(self._device)
            output = layer.run(hidden, call, tokens.info)
            if store:
                self.states.store(tokens.batch.start, unpad(output, tokens.batch))
            if counted:
                self._progress.tokens(tokens.batch.stop - tokens.batch.start)
        if layer.runner is not None and layer.runner.calls == 0:
            message = f"layer {index} has routed experts but did not run them through our call"
            raise ReapStreamError(message)
        self.times.running += time.monotonic() - started


def _lay_out(batch: Batch, corpus: Corpus, device: torch.device) -> _Tokens:
    ids = np.zeros((len(batch.rows), batch.width), dtype=np.int64)
    sources = np.zeros(ids.shape, dtype=np.int32)
    for line, row in enumerate(batch.row_indices):
        length = batch.lengths[line]
        ids[line, :length] = corpus.rows[row].tokens
        sources[line, :] = corpus.rows[row].source
    info = BatchTokens(
        valid_mask(batch).to(device), torch.from_numpy(sources.reshape(-1)).to(device)
    )
    return _Tokens(batch, ids, info)
