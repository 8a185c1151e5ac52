"""The pass: calibration tokens through the model, one layer after the other.

    with ForwardPass(...) as forward:
        forward.embed()
        for index in range(num_layers):
            with forward.layer(index, accumulator) as layer:
                forward.advance(index, layer)

Hidden states of all tokens are held once and replaced batch by batch. What else a family hands from
layer to layer is held with them, as long as a layer to come needs it.

The same rows can be on their way more than once, through pruned twins of the layers: each way has
hidden states of its own (`new_states`), and one reading of a layer serves them all.
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
from reap_stream.calibration.batches import Batch, pad, unpad, valid_mask
from reap_stream.calibration.carried import Key
from reap_stream.calibration.corpus import Corpus
from reap_stream.calibration.dealing import dealt_tokens
from reap_stream.checkpoint.reader import Reader
from reap_stream.errors import ReapStreamError
from reap_stream.model.architecture import Architecture
from reap_stream.model.arena import Arena
from reap_stream.model.experts import BatchTokens
from reap_stream.model.handover import EMBEDDED, Origin
from reap_stream.model.layer import RawSink, StreamedLayer, StreamedModel
from reap_stream.model.mtp_inputs import MtpInputs
from reap_stream.model.seen import Seen
from reap_stream.model.skeleton import Skeleton
from reap_stream.mtp_pass import MtpPass
from reap_stream.preparation import Preparation
from reap_stream.progress import Progress
from reap_stream.scoring.accumulator import SaliencyAccumulator
from reap_stream.scoring.halves import row_shares


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
        arena: memory for experts, shared with passes of which one at a time has a layer open.
    """

    def __init__(
        self,
        ready: Preparation,
        reader: Reader,
        *,
        spill_path: Path,
        progress: Progress,
        arena: Arena | None = None,
    ) -> None:
        self.times = ForwardTimes()
        model, corpus, memory = ready.model, ready.corpus, ready.memory
        self._device = ready.device
        self._progress = progress
        self._handover = ready.handover
        self._skeleton = Skeleton(model, reader, ready.device, ready.handover)
        options: dict[str, Any] = {
            "expert_slots": memory.expert_slots,
            "grouped": memory.grouped,
            "arena": Arena(ready.device) if arena is None else arena,
        }
        self._streamed = StreamedModel(model, reader, ready.device, **options)
        self._mtp: MtpPass | None = None
        head = ready.mtp.head
        if head is not None:
            own = StreamedModel(head.opened, reader, ready.device, **options)
            inputs = MtpInputs(head, self._skeleton, ready.device)
            self._mtp = MtpPass(head.first, own, inputs)
        shares = row_shares(row.source for row in corpus.rows)
        self._batches = [_lay_out(batch, corpus, shares, ready.device) for batch in ready.batches]
        self._num_tokens = dealt_tokens(ready.batches)
        self._spills = memory.spill
        self.states = self.new_states(spill_path)

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

    def new_states(self, spill_path: Path) -> HiddenStates:
        """Room for the hidden states of all rows of this rank; what it holds is undefined.

        Args:
            spill_path: where they go if they do not stay in memory.
        """
        shape, dtype = self._handover.token_shape, self._handover.dtype
        path = spill_path if self._spills else None
        # A rank without rows has room for one token that it never looks at.
        return HiddenStates.create(max(1, self._num_tokens), shape, dtype, spill_path=path)

    def skip(self, layers: int) -> None:
        """Counts layers that an earlier run finished."""
        self._progress.skip(layers, self._num_tokens)

    def embed(self, others: Sequence[HiddenStates] = ()) -> None:
        """Puts the embedded tokens into the hidden states, and into `others` of this pass."""
        if EMBEDDED not in self._handover.live[0]:
            return
        for tokens in self._batches:
            hidden, _ = self._skeleton.embed(tokens.ids)
            for states in (self.states, *others):
                states.store(tokens.batch.start, unpad(hidden, tokens.batch))

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
        streamed, own = self._part(index)
        with streamed.layer(own, statistics=accumulator, sink=sink) as layer:
            self.times.reading += time.monotonic() - started
            following, next_own = self._part(index + 1)
            following.prefetch(next_own)
            yield layer
        _native.trim_memory()

    @contextmanager
    def pruned_layer(
        self, index: int, full: StreamedLayer, reduced: Architecture, kept: Sequence[int]
    ) -> Iterator[StreamedLayer]:
        """The layer with its kept experts only; see `StreamedModel.pruned_layer`."""
        streamed, own = self._part(index)
        with streamed.pruned_layer(own, full, reduced, kept) as layer:
            yield layer

    def _part(self, index: int) -> tuple[StreamedModel, int]:
        """What gives a layer, and the layer's number there."""
        if self._mtp is None or index < self._mtp.first:
            return self._streamed, index
        return self._mtp.streamed, index - self._mtp.first

    def advance(
        self,
        index: int,
        layer: StreamedLayer,
        *,
        states: HiddenStates | None = None,
        store: bool = True,
        counted: bool = True,
    ) -> None:
        """Runs a layer on all tokens.

        Args:
            index: which layer.
            layer: the layer.
            states: the hidden states it runs on; None: those of the pass itself.
            store: replace the hidden states by the layer's outputs; False: look on only.
            counted: these tokens are what the progress bar counts for this layer.

        Raises:
            ReapStreamError: the layer has routed experts but did not call them.
        """
        started = time.monotonic()
        states = self.states if states is None else states
        for tokens in self._batches:
            outputs = self._run(index, layer, tokens, states)
            if store:
                self._store(index, tokens.batch, outputs, states)
            if counted:
                self._progress.tokens(tokens.batch.stop - tokens.batch.start)
        if layer.runner is not None and layer.runner.calls == 0 and self._batches:
            message = f"layer {index} has routed experts but did not run them through our call"
            raise ReapStreamError(message)
        self.times.running += time.monotonic() - started

    def finish(self, states: HiddenStates | None = None) -> Seen:
        """Replaces the last layer's outputs by what the model's head sees.

        The pass must have been prepared with a handover that reaches to the model's end.

        Args:
            states: the hidden states; None: those of the pass itself.

        Returns:
            How what the head sees lies in them.

        Raises:
            UnsupportedError: the head sees more than layers hand on, so there is no room for it.
        """
        states = self.states if states is None else states
        seen = Seen(0, states.dtype)
        for tokens in self._batches:
            batch = tokens.batch
            given = self._given(self._handover.num_layers, batch, states)
            hidden = unpad(self._skeleton.finish(tokens.ids, given), batch)
            seen = Seen(hidden.shape[-1], hidden.dtype)
            states.store(batch.start, seen.laid_out(hidden, states.token_shape, states.dtype))
            states.carried.keep_only(batch.start, ())
        return seen

    def _run(
        self, index: int, layer: StreamedLayer, tokens: _Tokens, states: HiddenStates
    ) -> list[Any]:
        """Runs a layer on one batch; gives its outputs, hidden states first."""
        batch = tokens.batch
        if self._mtp is not None and index >= self._mtp.first:
            hidden = pad(states.load(batch.start, batch.stop), batch).to(self._device)
            return [layer.run(*self._mtp.call(index, batch, tokens.ids, tokens.info, hidden))]
        made = self._skeleton.call(index, tokens.ids, self._given(index, batch, states))
        return layer.run_whole(
            made.hidden, made.call, tokens.info, self._handover.outline(index)
        )  # fmt: skip

    def _given(
        self, index: int, batch: Batch, states: HiddenStates
    ) -> dict[Origin, torch.Tensor]:  # fmt: skip
        """What earlier layers gave for a layer, of one batch."""
        given = {}
        for origin in self._handover.live[index]:
            if origin == Origin(index - 1, 0):
                value = pad(states.load(batch.start, batch.stop), batch)
            else:
                value = states.carried.load(Key(*origin, batch.start))
            given[origin] = value.to(self._device)
        return given

    def _store(
        self, index: int, batch: Batch, outputs: Sequence[Any], states: HiddenStates
    ) -> None:
        """Keeps what a layer gave as long as later ones need it, and forgets the rest."""
        states.store(batch.start, unpad(outputs[0], batch))
        needed = self._handover.carried(index + 1)
        states.carried.keep_only(batch.start, needed)
        for origin in needed:
            if origin.layer == index:
                states.carried.store(Key(*origin, batch.start), outputs[origin.number])


def _lay_out(
    batch: Batch, corpus: Corpus, shares: np.ndarray[Any, Any], device: torch.device
) -> _Tokens:
    ids = np.zeros((len(batch.rows), batch.width), dtype=np.int64)
    sources = np.zeros(ids.shape, dtype=np.int32)
    for line, row in enumerate(batch.row_indices):
        length = batch.lengths[line]
        ids[line, :length] = corpus.rows[row].tokens
        sources[line, :] = shares[row]
    info = BatchTokens(
        valid_mask(batch).to(device), torch.from_numpy(sources.reshape(-1)).to(device)
    )
    return _Tokens(batch, ids, info)
