"""Learns what goes from layer to layer in a model, before a weight is read.

The model's forward is run a few times on four tokens, with random numbers for the weights outside
the layers and random answers for the layers. What stays the same and what differs between these
runs tells where each part of a layer's call comes from; see `handover`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from reap_stream.errors import UnsupportedError
from reap_stream.model.architecture import Architecture
from reap_stream.model.calls import form, leaves
from reap_stream.model.handover import EMBEDDED, Handover, Kind, Origin, Source
from reap_stream.model.outline import outline_at
from reap_stream.model.probing import Probe, Run

_PROBE_WIDTH = 4
# What is kept for a token may grow with its row, until an indexer's choice is full.
_WIDEST_PROBE = 4096
# A plan and the pass ask for the same: it is learnt once for a model.
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[torch.device, int, bool], Handover]] = (
    WeakKeyDictionary()
)


def read_handover(
    architecture: Architecture,
    device: torch.device,
    longest_row: int = _PROBE_WIDTH,
    *,
    to_end: bool = False,
) -> Handover:
    """Learns what goes from layer to layer.

    Args:
        architecture: the model, its parameters on the meta device.
        device: where the model's code around its layers runs.
        longest_row: tokens of the longest row that will run.
        to_end: also what the code behind the last layer needs, which is kept until then.

    Raises:
        UnsupportedError: the model's layers cannot be run one by one.
    """
    known = _KNOWN.setdefault(architecture.model, {})
    key = (device, longest_row, to_end)
    if key not in known:
        with Probe(architecture, device) as probe:
            reading = _Reading(architecture.name, probe)
            known[key] = reading.handover(longest_row, to_end=to_end)
    return known[key]


class _Reading:
    """Compares runs of a probe."""

    def __init__(self, name: str, probe: Probe) -> None:
        self._name = name
        self._probe = probe
        self._outlines = probe.learn_outlines(_PROBE_WIDTH)
        self._run = self._again()
        self._other_tokens = self._again(tokens=1)
        self._other_answers = self._again(answers=1)

    def _again(self, **changes: Any) -> Run:
        return self._probe.run(self._outlines, _PROBE_WIDTH, **changes)

    def handover(self, longest_row: int, *, to_end: bool) -> Handover:
        count = len(self._run.calls)
        sources = [self._sources(layer) for layer in range(count)]
        first = self._run.calls[0].hidden
        hidden = self._outlines[0].outputs[0] if self._outlines else first
        self._check_alike(hidden)
        if (first.shape, first.dtype) == (hidden.shape, hidden.dtype):
            sources[0][0] = EMBEDDED
        dependent = self._dependent(sources)
        needs = [self._handed(layer, sources[layer]) for layer in range(count)]
        if dependent:
            self._trace_back(dependent, needs)
        if to_end:
            needs.append(self._needed_behind(count))
        live = tuple(
            frozenset(origin for later in needs[layer:] for origin in later if origin.layer < layer)
            for layer in range(len(needs))
        )
        made = Handover(
            sources=tuple(map(tuple, sources)),
            outlines=self._outlines,
            live=live,
            token_shape=tuple(hidden.shape[2:]),
            dtype=hidden.dtype,
            carried_nbytes=0,
        )
        return replace(made, carried_nbytes=self._carried_nbytes(made, longest_row))

    def _sources(self, layer: int) -> list[Source]:
        own = self._run.calls[layer].tree
        others = [run.calls[layer].tree for run in (self._other_tokens, self._other_answers)]
        if any(form(other) != form(own) for other in others):
            message = f"{self._name} calls layer {layer} in another form for other tokens"
            raise UnsupportedError(message)
        return [
            self._source(leaf, alike)
            for leaf, *alike in zip(leaves(own), *map(leaves, others), strict=True)
        ]

    def _source(self, leaf: Any, others: Sequence[Any]) -> Source:
        if leaf is self._run.ids:
            return Kind.TOKENS
        for layer, outputs in enumerate(self._run.outputs):
            for number, output in enumerate(outputs):
                if isinstance(leaf, torch.Tensor) and leaf is output:
                    return Origin(layer, number)
        same = all(_equal(leaf, other) for other in others)
        return Kind.CONSTANT if same else Kind.COMPUTED

    def _handed(self, layer: int, sources: Sequence[Source]) -> set[Origin]:
        """The outputs that a layer is called with and looks at."""
        used = self._outlines[layer].used if layer < len(self._outlines) else None
        return {
            source
            for number, source in enumerate(sources)
            if isinstance(source, Origin) and (used is None or number == 0 or number in used)
        }

    def _dependent(self, sources: Sequence[Sequence[Source]]) -> list[tuple[int, int]]:
        """(layer, leaf) of what the model computes with what layers gave."""
        return [
            (layer, number)
            for layer, own in enumerate(sources)
            for number, source in enumerate(own)
            if source is Kind.COMPUTED and self._differs(self._other_answers, layer, number)
        ]

    def _differs(self, other: Run, layer: int, number: int) -> bool:
        mine = leaves(self._run.calls[layer].tree)[number]
        return not _equal(mine, leaves(other.calls[layer].tree)[number])

    def _trace_back(self, dependent: Sequence[tuple[int, int]], needs: list[set[Origin]]) -> None:
        """Changes one output after the other, to see what is computed with it."""
        for origin in self._all_outputs(len(self._outlines)):
            other = self._again(answers={tuple(origin): 1})
            for layer, number in dependent:
                if layer > origin.layer and self._differs(other, layer, number):
                    self._check_hidden_states(origin, layer)
                    needs[layer].add(origin)

    def _needed_behind(self, count: int) -> set[Origin]:
        """The outputs of `count` layers from which the model makes what its head sees."""
        last = Origin(count - 1, 0)
        usual = self._end({})
        others = [origin for origin in self._all_outputs(count) if origin != last]
        if torch.equal(usual, self._end(dict.fromkeys(others, 1))):
            return {last}
        needed = {last}
        for origin in others:
            if not torch.equal(usual, self._end({origin: 1})):
                self._check_hidden_states(origin, count)
                needed.add(origin)
        return needed

    def _end(self, answers: dict[Origin, int]) -> torch.Tensor:
        return self._probe.finish(self._outlines, _PROBE_WIDTH, answers=answers)

    def _check_hidden_states(self, origin: Origin, layer: int) -> None:
        # In place of other outputs stand tensors of the wrong length, which nothing may compute with.
        if origin.number:
            called = (
                f"calls layer {layer} with something that it computes"
                if layer < len(self._run.calls)
                else "computes what its head sees"
            )
            message = (
                f"{self._name} {called} from more than the hidden states of layer {origin.layer}"
            )
            raise UnsupportedError(message)

    def _all_outputs(self, count: int) -> Iterator[Origin]:
        """The tensors that the first `count` layers give."""
        for layer in range(count):
            outline = outline_at(self._outlines, layer)
            for number, output in enumerate(outline.outputs if outline else ()):
                if isinstance(output, torch.Tensor):
                    yield Origin(layer, number)

    def _check_alike(self, hidden: torch.Tensor) -> None:
        for layer, outline in enumerate(self._outlines):
            given = outline.outputs[0]
            if not isinstance(given, torch.Tensor) or given.shape != hidden.shape:
                message = (
                    f"layer {layer} of {self._name} gives {_shown(given)}, layer 0 "
                    f"{_shown(hidden)}: hidden states that change their shape are not supported"
                )
                raise UnsupportedError(message)
            if given.dtype != hidden.dtype or given.shape[:2] != (1, _PROBE_WIDTH):
                message = f"layer {layer} of {self._name} gives {_shown(given)} for 1 × 4 tokens"
                raise UnsupportedError(message)

    def _carried_nbytes(self, made: Handover, longest_row: int) -> int:
        carried = [made.carried(layer) for layer in range(len(made.live))]
        if not any(carried):
            return 0
        width = max(_PROBE_WIDTH, min(longest_row, _WIDEST_PROBE))
        outlines = self._probe.learn_outlines(width)
        nbytes: list[int] = [
            sum(outlines[origin.layer].outputs[origin.number].nbytes for origin in origins)
            for origins in carried
        ]
        return -(-max(nbytes) // width)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        if not isinstance(right, torch.Tensor) or left.shape != right.shape:
            return False
        return bool(torch.equal(left, right))
    return bool(left is right or left == right)
