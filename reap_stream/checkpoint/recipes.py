"""Output tensors that are computed, where most are runs of the source's bytes (see `pieces`).

A recipe stands in the `Role` of a source tensor. The layout asks it what it will put in that
tensor's place, the writer and the verifier ask for its steps once the kept experts are known. A
step names the source bytes it needs and computes parts of the output tensors from them, so that
a weight of many gigabytes never has to be in memory at once. Both run the same steps, hence what
is computed must follow from the source's bytes and the kept experts alone.

For what this is used: weights written in another format (`reap_stream.recoding`), and tensors
whose values speak of experts by number, such as a table of tokens and their experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from reap_stream.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from reap_stream.checkpoint.layout import OutputTensor
    from reap_stream.checkpoint.refs import TensorRef

Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"


class Result(NamedTuple):
    """A tensor that a recipe makes.

    Attributes:
        name: key in the pruned checkpoint.
        dtype: safetensors dtype tag.
        shape: logical shape after pruning.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class Span(NamedTuple):
    """A run of bytes of a source tensor: `nbytes` from byte `offset` of the tensor."""

    ref: TensorRef
    offset: int
    nbytes: int


class Patch(NamedTuple):
    """Bytes of an output tensor: uint8 `data`, contiguous, from byte `offset` of tensor `name`."""

    name: str
    offset: int
    data: Bytes


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a recipe's work.

    Attributes:
        spans: the source bytes it needs.
        compute: makes patches of the bytes of `spans` (uint8, read only, in that order).
    """

    spans: tuple[Span, ...]
    compute: Callable[[Sequence[Bytes]], Iterable[Patch]]


class Recipe(Protocol):
    """How output tensors are computed from source tensors.

    Put it into the `Role` of each source tensor it reads, beside what that role says already
    (``replace(role, recipe=recipe)``): none of these is copied. `Role.layer` decides when the
    recipe's tensors are written: with the experts of that layer, or, if None, as soon as their
    sources were read.
    """

    @property
    def place(self) -> str:
        """Name of the source tensor in whose place, in the order of the bytes, results lie."""
        ...

    def results(self, keep: int) -> Sequence[Result]:
        """The tensors it makes when `keep` experts a layer stay; none if this one goes."""
        ...

    def steps(self, kept: Sequence[int]) -> Iterable[Step]:
        """The work, once it is known which experts stay.

        Args:
            kept: source numbers of the kept experts of the role's layer, rising; new number =
                position. Empty where the role has no layer.

        Returns:
            Steps whose patches together fill each of `results(len(kept))` exactly once.
        """
        ...


def group_by_recipe(outs: Iterable[OutputTensor]) -> list[tuple[Recipe, dict[str, OutputTensor]]]:
    """The computed ones among output tensors, by name, together with what is computed with them."""
    groups: dict[int, tuple[Recipe, dict[str, OutputTensor]]] = {}
    for out in outs:
        if out.recipe is not None:
            groups.setdefault(id(out.recipe), (out.recipe, {}))[1][out.name] = out
    return list(groups.values())


def check_filled(results: Mapping[str, OutputTensor], filled: Mapping[str, int]) -> None:
    """Check that a recipe gave as many bytes as it said it would.

    Raises:
        OutputError: it did not; a defect of the recipe.
    """
    for name, out in results.items():
        if filled[name] != out.nbytes:
            raise OutputError(f"{name!r}: {filled[name]} bytes were computed, {out.nbytes} planned")
