"""The plain data that flows through the package: where a tensor lies and what pruning does to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reap_stream.checkpoint.recipes import Recipe


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor of a checkpoint, as its shard's header describes it.

    Attributes:
        name: key in the checkpoint.
        file: the shard that holds the bytes.
        dtype: safetensors dtype tag, e.g. ``"BF16"`` or ``"F8_E4M3"``.
        shape: logical shape.
        offset: first byte, counted from the start of the file.
        nbytes: length in bytes.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Role:
    """What pruning does to one tensor of the source.

    Exactly one of three kinds:

    * copied whole: all fields None;
    * holds every expert of a layer along one dimension, each with as many entries (router rows,
      correction bias, fused experts): `layer` and `dim` set, `extra` where further entries follow;
    * belongs to one expert: `layer`, `expert` and `component` set. `component` is the position,
      in the name split at dots, of the number that names the expert, so the output's name
      follows from the new number.

    Whichever it is, its bytes are copied unless it has a recipe: then the recipe computes what
    takes its place.

    Attributes:
        layer: index of the decoder layer the experts belong to; next-token-prediction layers
            carry on the count, as checkpoints number them.
        dim: dimension along which the experts lie.
        extra: entries along `dim` behind those of the experts that stay whatever is pruned: a
            router's rows for shared experts or for an expert that does nothing.
        expert: number of the expert.
        component: which part of the dotted name is the expert's number.
        recipe: computes output tensors from this one (and others) instead of copying its bytes.
    """

    layer: int | None = None
    dim: int | None = None
    expert: int | None = None
    component: int | None = None
    extra: int = 0
    recipe: Recipe | None = field(default=None, compare=False)


WHOLE = Role()
