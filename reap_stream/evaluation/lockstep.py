"""All candidates through their layers at once, each layer's weights read once.

Layer after layer of a checkpoint is read, and run on the hidden states of everyone who has its
weights: first those of the checkpoint itself, then those of each of its prunings, through a twin
of the layer that has the kept experts only and shares all weights. Then the next checkpoint's layer
is read. So one layer of one checkpoint is in memory at a time, and hidden states of everyone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from typing_extensions import Self

from reap_stream import _native
from reap_stream.calibration.activations import HiddenStates
from reap_stream.checkpoint.reader import Reader
from reap_stream.errors import ForwardError
from reap_stream.evaluation.metrics import HiddenError
from reap_stream.evaluation.opening import OpenedEvaluation
from reap_stream.evaluation.positions import Positions
from reap_stream.forward import ForwardPass
from reap_stream.model.arena import Arena
from reap_stream.model.layer import StreamedLayer
from reap_stream.model.seen import Seen
from reap_stream.progress import Progress

# Hidden states that are compared at a time.
_PIECE_NBYTES = 8 * 2**20


class Lockstep:
    """The pass of all candidates; a context that holds their hidden states.

    Args:
        opened: what is evaluated.
        reader: reads the weights.
        positions: what is known of each token.
        scratch: directory for hidden states that memory has no room for.
        progress: is told of layers and tokens.

    Attributes:
        states: of each contestant.
        seen: how what each contestant's head sees lies in its states, once all layers ran.
        errors: of each contestant, layer → relative error of the hidden states after it.
    """

    def __init__(
        self,
        opened: OpenedEvaluation,
        reader: Reader,
        positions: Positions,
        *,
        scratch: Path,
        progress: Progress,
    ) -> None:
        self._opened = opened
        self._positions = positions
        self._progress = progress
        self._arena = Arena(opened.device)
        self._passes = [
            ForwardPass(
                ready,
                reader,
                spill_path=scratch / f"states-{number}",
                progress=progress,
                arena=self._arena,
            )
            for number, ready in enumerate(opened.models)
        ]
        self.states: list[HiddenStates] = []
        for number, contestant in enumerate(opened.contestants):
            forward = self._passes[contestant.model]
            own = contestant.candidate is None
            path = scratch / f"candidate-{number}"
            self.states.append(forward.states if own else forward.new_states(path))
        self.seen: list[Seen] = []
        self.errors: list[dict[int, float]] = [{} for _ in opened.contestants]

    def __enter__(self) -> Self:
        """Nothing more to open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Gives hidden states back."""
        for states in self.states:
            states.close()

    def run(self) -> None:
        """Runs every layer, and leaves in `states` what the heads see."""
        opened = self._opened
        for model, forward in enumerate(self._passes):
            forward.embed([self.states[way] for way in opened.ways(model)[1:]])
        depths = [opened.depth(model) for model in range(len(opened.models))]
        for index in range(max(depths)):
            for model, depth in enumerate(depths):
                if index < depth:
                    self._run_layer(model, index)
            if index < depths[0]:
                self._compare(index)
        self._arena.release()
        self._progress.stage("norms")
        for contestant, states in zip(opened.contestants, self.states, strict=True):
            self.seen.append(self._passes[contestant.model].finish(states))
        _native.trim_memory()

    def _run_layer(self, model: int, index: int) -> None:
        forward = self._passes[model]
        with forward.layer(index) as layer:
            for way in self._opened.ways(model):
                self._advance(way, forward, index, layer)
        self._opened.orders[model].done(index)

    def _advance(self, way: int, forward: ForwardPass, index: int, layer: StreamedLayer) -> None:
        contestant, states = self._opened.contestants[way], self.states[way]
        if contestant.kept is None or layer.store is None:
            forward.advance(index, layer, states=states)
            return
        reduced = self._opened.reduced[contestant.keep]
        with forward.pruned_layer(index, layer, reduced, contestant.kept[index]) as twin:
            forward.advance(index, twin, states=states)

    def _compare(self, index: int) -> None:
        """Measures how far everyone's hidden states are from the reference's."""
        reference = self.states[0]
        for way, states in enumerate(self.states[1:], start=1):
            model = self._opened.contestants[way].model
            alike = states.token_shape == reference.token_shape
            if not alike or index >= self._opened.depth(model):
                continue
            error = HiddenError(self._positions.num_sources)
            step = max(1, _PIECE_NBYTES // reference.row_nbytes)
            for start in range(0, reference.num_tokens, step):
                stop = min(start + step, reference.num_tokens)
                sources = self._positions.sources[start:stop]
                self._add(error, way, index, slice(start, stop), sources)
            self.errors[way][index] = error.relative_error()

    def _add(
        self, error: HiddenError, way: int, index: int, tokens: slice, sources: torch.Tensor
    ) -> None:
        own, reference = (
            states.load(tokens.start, tokens.stop) for states in (self.states[way], self.states[0])
        )
        try:
            error.add(own, reference, sources)
        except ForwardError as problem:
            guilty = way if bool(reference.isfinite().all()) else 0
            message = (
                f"{self._opened.contestants[guilty].label}: the hidden states behind layer {index} "
                "are not finite numbers: the weights are damaged, or need --compute-dtype float32"
            )
            raise ForwardError(message) from problem
