"""What goes from layer to layer in a model: where each part of a layer's call comes from.

    CONSTANT   the same whatever the tokens and the answers are (masks, position embeddings)
    TOKENS     the token ids themselves
    Origin     an output of an earlier layer, handed on as it is: mostly its hidden states
    COMPUTED   anything else: made anew for each batch by running the model's forward

The outputs that must be kept until a layer runs follow from it. It is learnt from the model's own
code; see `wiring`.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from reap_stream.model.outline import Outline


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


@dataclass(frozen=True, slots=True)
class Handover:
    """What goes from layer to layer.

    Attributes:
        sources: for each layer where the leaves of its call come from, the hidden states first.
        outlines: what each layer but the last gives, on a row of a few tokens.
        live: for each layer the outputs of earlier ones that it or a later one needs; if learnt to
            the end, one entry more: what the model's code behind its layers needs.
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

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.sources)

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
