"""What goes from layer to layer in a model, learnt from its own code before a weight is read.

The model's forward is run a few times on four tokens, with random numbers for the weights outside
the layers and random answers for the layers. What a layer is called with then falls into

    CONSTANT   the same whatever the tokens and the answers are (masks, position embeddings)
    TOKENS     the token ids themselves
    Origin     an output of an earlier layer, handed on as it is: mostly its hidden states
    COMPUTED   anything else: made anew for each batch by running the model's forward

and the outputs that must be kept until a layer runs follow from it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn

from reap_stream.errors import UnsupportedError
from reap_stream.model.architecture import Architecture
from reap_stream.model.calls import form, leaves
from reap_stream.model.outline import Outline
from reap_stream.model.probing import Probe, Run

_PROBE_WIDTH = 4
# What is kept for a token may grow with its row, until an indexer's choice is full.
_WIDEST_PROBE = 4096


class Kind(enum.Enum):
    """Where something a layer is called with comes from, if not from an earlier layer."""

    CONSTANT = enum.auto()
    TOKENS = enum.auto()
    COMPUTED = enum.auto()


class Origin(NamedTuple):
    """An output of a layer: its layer, and its number among the layer's outputs.

    Layer -1 stands for what the first layer is called with.
    """

    layer: int
    number: int


Source: TypeAlias = "Kind | Origin"
EMBEDDED = Origin(-1, 0)
LAST = Outline(None, is_plain=True)
# A plan and the pass ask for the same: it is learnt once for a model.
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[torch.device, int], Handover]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Handover:
    """What goes from layer to layer.

    Attributes:
        sources: for each layer where the leaves of its call come from, the hidden states first.
        outlines: what each layer but the last gives, on a row of a few tokens.
        live: for each layer the outputs of earlier ones that it or a later one needs.
        token_shape: shape of one token's hidden states between layers.
        dtype: their dtype.
        carried_nbytes: bytes a token takes in what is kept beside the hidden states.
    """

    sources: tuple[tuple[Source, ...], ...]
    outlines: tuple[Outline, ...]
    live: tuple[frozenset[Origin], ...]
    token_shape: tuple[int, ...]
    dtype: torch.dtype
    carried_nbytes: int

    def carried(self, layer: int) -> list[Origin]:
        """What must be kept while a layer runs, beside the hidden states it replaces."""
        if layer >= len(self.live):
            return []
        before = Origin(layer - 1, 0)
        later = self.live[layer + 1] if layer + 1 < len(self.live) else frozenset()
        return sorted(self.live[layer] - ({before} - later))

    def outline(self, layer: int) -> Outline:
        """What a layer gives; of the model's last, whose output no layer takes, hidden states."""
        return self.outlines[layer] if layer < len(self.outlines) else LAST

    def is_computed(self, layer: int) -> bool:
        """Whether the model's forward must run anew for each batch to call the layer."""
        return Kind.COMPUTED in self.sources[layer]

    @property
    def token_elements(self) -> int:
        """Numbers in one token's hidden states between two layers."""
        return math.prod(self.token_shape)

    @property
    def token_nbytes(self) -> int:
        """Bytes that one token takes between two layers."""
        return self.token_elements * self.dtype.itemsize + self.carried_nbytes


def read_handover(
    architecture: Architecture, device: torch.device, longest_row: int = _PROBE_WIDTH
) -> Handover:
    """Learns what goes from layer to layer.

    Args:
        architecture: the model, its parameters on the meta device.
        device: where the model's code around its layers runs.
        longest_row: tokens of the longest row that will run.

    Raises:
        UnsupportedError: the model's layers cannot be run one by one.
    """
    known = _KNOWN.setdefault(architecture.model, {})
    key = (device, longest_row)
    if key not in known:
        with Probe(architecture, device) as probe:
            known[key] = _Reading(architecture.name, probe).handover(longest_row)
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

    def handover(self, longest_row: int) -> Handover:
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
        live = tuple(
            frozenset(origin for later in needs[layer:] for origin in later if origin.layer < layer)
            for layer in range(count)
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
        for origin in self._all_outputs():
            other = self._again(answers={tuple(origin): 1})
            for layer, number in dependent:
                if layer > origin.layer and self._differs(other, layer, number):
                    self._check_hidden_states(origin, layer)
                    needs[layer].add(origin)

    def _check_hidden_states(self, origin: Origin, layer: int) -> None:
        # In place of other outputs stand tensors of the wrong length, which nothing may compute with.
        if origin.number:
            message = (
                f"{self._name} calls layer {layer} with something that it computes from more than "
                f"the hidden states of layer {origin.layer}"
            )
            raise UnsupportedError(message)

    def _all_outputs(self) -> Iterator[Origin]:
        for layer, outputs in enumerate(self._run.outputs):
            for number, output in enumerate(outputs):
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
