"""The recipes that read weights of the source and write them through an encoder.

Plain weights pass through memory in runs of rows. Others (codes and scales) are decoded whole, one
matrix at a time: how their parts are cut into rows is their format's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
import torch

from reap_stream.checkpoint.recipes import Bytes, Patch, Result, Span, Step
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats import Weight
from reap_stream.model.loading import decode, typed
from reap_stream.recoding.base import Encoder

_CPU: Final = torch.device("cpu")
# Source bytes of one step: enough for all threads, and in their caches when read a second time.
CHUNK_NBYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class WeightRecipe:
    """One weight in another format: a dense one, or that of the expert in one place.

    Attributes:
        place: see `Recipe`.
        name: of the weight in the output.
        members: its counterparts by the source's expert number; a dense weight alone.
        slot: new number of the expert; None for a dense weight.
        encoder: the format.
    """

    place: str
    name: str
    members: Sequence[Weight]
    slot: int | None
    encoder: Encoder

    def results(self, keep: int) -> Sequence[Result]:
        """The tensors of the weight."""
        if self.slot is not None and self.slot >= keep:
            return ()
        shape = self.members[self.slot or 0].shape
        return [Result(self.name + p.suffix, p.dtype, p.shape) for p in self.encoder.parts(shape)]

    def steps(self, kept: Sequence[int]) -> Iterator[Step]:
        """Runs of rows."""
        weight = self.members[0 if self.slot is None else kept[self.slot]]
        for row, spans, chunk in _chunks(weight, self.encoder):
            yield Step(spans, self._compute(weight, row, chunk))

    def _compute(
        self, weight: Weight, row: int, chunk: Weight
    ) -> Callable[[Sequence[Bytes]], Iterator[Patch]]:
        def compute(raws: Sequence[Bytes]) -> Iterator[Patch]:
            values = _values(chunk, raws, self.encoder.exact)
            yield from _encoded(self.encoder, self.name, weight, values, row)

        return compute


class Split(Protocol):
    """How experts that lie in one tensor come apart; see `reap_stream.recoding.splitting`."""

    def shapes(self, place: str, slot: int) -> Mapping[str, tuple[int, ...]]:
        """The matrices of the expert in a place: name in the output → shape."""
        ...

    def cut(self, values: torch.Tensor) -> Sequence[torch.Tensor]:
        """These matrices, in that order, of an expert's slice [1, ...] of the tensor."""
        ...


@dataclass(frozen=True, slots=True)
class SplitRecipe:
    """Experts of a layer in one tensor, each written under a name of its own.

    Attributes:
        place: see `Recipe`.
        weight: holds the experts of a layer along dimension 0.
        split: how they come apart.
        encoder: the format.
    """

    place: str
    weight: Weight
    split: Split
    encoder: Encoder

    def results(self, keep: int) -> Sequence[Result]:
        """The tensors of each matrix of each expert."""
        return [
            Result(name + part.suffix, part.dtype, part.shape)
            for slot in range(keep)
            for name, shape in self.split.shapes(self.weight.name, slot).items()
            for part in self.encoder.parts(shape)
        ]

    def steps(self, kept: Sequence[int]) -> Iterator[Step]:
        """A step an expert."""
        for slot, expert in enumerate(kept):
            spans, one = _expert_slice(self.weight, expert, self.weight.shape[0])
            yield Step(spans, self._compute(slot, one))

    def _compute(self, slot: int, one: Weight) -> Callable[[Sequence[Bytes]], Iterator[Patch]]:
        names = list(self.split.shapes(self.weight.name, slot))

        def compute(raws: Sequence[Bytes]) -> Iterator[Patch]:
            matrices = self.split.cut(_values(one, raws, self.encoder.exact))
            for name, matrix in zip(names, matrices, strict=True):
                yield from _encoded(self.encoder, name, self.weight, matrix.contiguous())

        return compute


@dataclass(frozen=True, slots=True)
class FusedRecipe:
    """Experts of a layer in one tensor, decoded expert by expert under the weight's own name.

    Attributes:
        place: see `Recipe`.
        weight: holds the experts of a layer along dimension 0, each with as many rows.
        num_experts: of the layer.
        encoder: a format of one tensor that has the weight's shape.
    """

    place: str
    weight: Weight
    num_experts: int
    encoder: Encoder

    def results(self, keep: int) -> Sequence[Result]:
        """One tensor of fewer experts."""
        rows = self.weight.shape[0] // self.num_experts
        (part,) = self.encoder.parts((rows * keep, *self.weight.shape[1:]))
        return [Result(self.weight.name + part.suffix, part.dtype, part.shape)]

    def steps(self, kept: Sequence[int]) -> Iterator[Step]:
        """A step an expert."""
        for slot, expert in enumerate(kept):
            spans, one = _expert_slice(self.weight, expert, self.num_experts)
            yield Step(spans, self._compute(slot, one))

    def _compute(self, slot: int, one: Weight) -> Callable[[Sequence[Bytes]], Iterator[Patch]]:
        def compute(raws: Sequence[Bytes]) -> Iterator[Patch]:
            values = _values(one, raws, self.encoder.exact)
            (data,) = self.encoder.encode(values, _where(self.weight))
            yield Patch(self.weight.name, slot * data.nbytes, data)

        return compute


def can_slice(weight: Weight, num_experts: int) -> bool:
    """Whether all parts of a fused weight hold the experts along dimension 0.

    A plain one may have several rows of dimension 0 for each.
    """
    shapes = [weight.shape, *(ref.shape for ref in weight.parts.values())]
    rows = weight.shape[0] // num_experts if weight.is_plain else 1
    return all(len(shape) > 1 and shape[0] == rows * num_experts for shape in shapes)


def working_nbytes(weight: Weight, encoder: Encoder, experts: int = 1) -> int:
    """Memory that a step of a weight's recipe takes, the bytes it writes included.

    Args:
        weight: the weight.
        encoder: the format it is written in.
        experts: experts it holds, each of which is a step.
    """
    elements = math.prod(weight.shape) // experts
    raw = weight.nbytes // experts
    if weight.is_plain and experts == 1:
        share = min(1.0, (CHUNK_NBYTES + encoder.rows * raw // weight.shape[0]) / max(raw, 1))
        return int(share * (raw + elements * (4 + encoder.exact.itemsize)))
    return raw + elements * (4 + encoder.exact.itemsize)


def _chunks(weight: Weight, encoder: Encoder) -> Iterator[tuple[int, tuple[Span, ...], Weight]]:
    """(first row, source bytes, the weight that they are) of each run of a weight's rows."""
    rows = weight.shape[0]
    if not weight.is_plain:
        yield 0, tuple(Span(ref, 0, ref.nbytes) for ref in weight.parts.values()), weight
        return
    ref = weight.parts["weight"]
    row_nbytes = ref.nbytes // rows if rows else 0
    together = max(1, CHUNK_NBYTES // max(1, row_nbytes * encoder.rows)) * encoder.rows
    for row in range(0, rows, together):
        count = min(together, rows - row)
        chunk = _plain(weight, ref, (count, *weight.shape[1:]), count * row_nbytes)
        yield row, (Span(ref, row * row_nbytes, count * row_nbytes),), chunk


def _plain(weight: Weight, ref: TensorRef, shape: tuple[int, ...], nbytes: int) -> Weight:
    return replace(weight, shape=shape, parts={"weight": replace(ref, shape=shape, nbytes=nbytes)})


def _expert_slice(weight: Weight, expert: int, num_experts: int) -> tuple[tuple[Span, ...], Weight]:
    """The bytes of one expert of a fused weight, and the weight [rows, ...] that they are."""
    rows = weight.shape[0] // num_experts
    spans = []
    parts = {}
    for role, ref in weight.parts.items():
        nbytes = ref.nbytes // num_experts
        spans.append(Span(ref, expert * nbytes, nbytes))
        parts[role] = replace(ref, shape=(rows, *ref.shape[1:]), nbytes=nbytes)
    return tuple(spans), replace(weight, shape=(rows, *weight.shape[1:]), parts=parts)


def _values(weight: Weight, raws: Sequence[Bytes], dtype: torch.dtype) -> torch.Tensor:
    """The numbers of a weight; plain ones in the dtype they have."""
    pairs = zip(weight.parts, raws, strict=True)
    raw = {role: torch.from_numpy(_writable(data)) for role, data in pairs}
    if weight.is_plain:
        return typed(weight.parts["weight"], raw["weight"]).view(weight.shape)
    return decode(weight, raw, dtype, _CPU)


def _writable(data: Bytes) -> Bytes:
    """An array that torch takes without a warning; nothing writes into it."""
    if data.flags.writeable:
        return data
    return np.array(data)


def _encoded(
    encoder: Encoder,
    name: str,
    weight: Weight,
    values: torch.Tensor,
    row: int | None = None,
) -> Iterator[Patch]:
    """The patches of a matrix, or of rows of `weight` from `row` on."""
    parts = encoder.parts(values.shape if row is None else weight.shape)
    for part, data in zip(parts, encoder.encode(values, _where(weight)), strict=True):
        yield Patch(name + part.suffix, part.offset(row or 0), data)


def _where(weight: Weight) -> str:
    return f"{next(iter(weight.parts.values())).file}: tensor {weight.name!r}"
