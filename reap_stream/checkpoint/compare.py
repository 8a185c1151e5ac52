"""Compares the tensors of a pruned checkpoint with the source bytes they are made of.

Runs of bytes are gathered into two buffers of bounded length, one filled from each checkpoint, so
a hundred thousand small tensors cost few calls and a fused layer of many gigabytes little memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from reap_stream.checkpoint.pieces import pieces
from reap_stream.checkpoint.recipes import group_by_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from reap_stream.checkpoint.layout import OutputTensor
    from reap_stream.checkpoint.reader import Reader, ReadRequest
    from reap_stream.checkpoint.recipes import Bytes, Patch, Step
    from reap_stream.checkpoint.refs import Role, TensorRef

_BUFFER_NBYTES: Final = 8 << 20
_BUFFER_SPANS: Final = 1 << 14


class Difference(NamedTuple):
    """The first byte in which a written tensor is not what it should be.

    Attributes:
        ref: the written tensor.
        offset: the byte, counted from the start of the tensor.
        found: its value.
        expected: what it should be.
        origin: the source tensor it should come from.
        is_computed: whether the value follows from the source's instead of being it.
    """

    ref: TensorRef
    offset: int
    found: int
    expected: int
    origin: TensorRef
    is_computed: bool = False

    def __str__(self) -> str:
        return (
            f"{self.ref.file}: tensor {self.ref.name!r}: byte {self.offset} of {self.ref.nbytes} "
            f"(byte {self.ref.offset + self.offset} of the file) is {self.found:#04x}, "
            f"{self.expected:#04x} {'computed from' if self.is_computed else 'in'} "
            f"{self.origin.name!r} of {self.origin.file}"
        )


class _Span(NamedTuple):
    written: TensorRef
    written_offset: int
    origin: TensorRef
    origin_offset: int
    nbytes: int


class Comparison:
    """One pruned checkpoint held against its source."""

    def __init__(
        self,
        written: Mapping[str, TensorRef],
        source: Mapping[str, TensorRef],
        roles: Mapping[str, Role],
        kept: Mapping[int, Sequence[int]],
    ) -> None:
        """Bind the two; nothing is read yet.

        Args:
            written: the pruned checkpoint's tensors by name.
            source: the source's tensors by name.
            roles: what pruning does to each tensor of the source.
            kept: source numbers of the kept experts by layer.
        """
        self._written = written
        self._source = source
        self._roles = roles
        self._kept = kept

    def differences(
        self, outs: Iterable[OutputTensor], reader: Reader, progress: Callable[[int], None]
    ) -> Iterator[Difference]:
        """Compare tensors, and give for each that differs the first byte that does.

        What a recipe makes is computed again from the source.

        Args:
            outs: the tensors as planned; those written have the planned length.
            reader: reads from both checkpoints.
            progress: called with the number of bytes just compared.

        Raises:
            ReadError: a file of either checkpoint could not be read.
        """
        buffers = np.empty((2, _BUFFER_NBYTES), dtype=np.uint8)
        reported: set[str] = set()
        planned = list(outs)
        for batch in _batches(self._spans(planned)):
            for difference in _compared(batch, reader, buffers):
                if difference.ref.name not in reported:
                    reported.add(difference.ref.name)
                    yield difference
            progress(sum(span.nbytes for span in batch))
        for difference in self._computed(planned, reader, progress):
            if difference.ref.name not in reported:
                reported.add(difference.ref.name)
                yield difference

    def _computed(
        self, outs: Iterable[OutputTensor], reader: Reader, progress: Callable[[int], None]
    ) -> Iterator[Difference]:
        for recipe, results in group_by_recipe(outs):
            layer = next(iter(results.values())).layer
            for step in recipe.steps(() if layer is None else self._kept[layer]):
                for patch in step.compute(_fetched(step, reader)):
                    # Not asked for where its dtype or shape is wrong already.
                    if patch.name not in results:
                        continue
                    written = self._written[patch.name]
                    found = np.empty(patch.data.nbytes, dtype=np.uint8)
                    reader.read_into([(written, patch.offset, found.nbytes, found)])
                    yield from _patch_fault(patch, written, found, self._source[recipe.place])
                    progress(found.nbytes)

    def _spans(self, outs: Iterable[OutputTensor]) -> Iterator[_Span]:
        for out in outs:
            if out.recipe is not None:
                continue
            written = self._written[out.name]
            for piece in pieces(out, self._source, self._roles, self._kept):
                for begin in range(0, piece.nbytes, _BUFFER_NBYTES):
                    nbytes = min(_BUFFER_NBYTES, piece.nbytes - begin)
                    src, dst = piece.src_offset + begin, piece.dst_offset + begin
                    yield _Span(written, dst, piece.ref, src, nbytes)


def _batches(spans: Iterable[_Span]) -> Iterator[list[_Span]]:
    batch: list[_Span] = []
    filled = 0
    for span in spans:
        if batch and (filled + span.nbytes > _BUFFER_NBYTES or len(batch) == _BUFFER_SPANS):
            yield batch
            batch, filled = [], 0
        batch.append(span)
        filled += span.nbytes
    if batch:
        yield batch


def _compared(
    batch: Sequence[_Span], reader: Reader, buffers: np.ndarray[tuple[int, int], np.dtype[np.uint8]]
) -> Iterator[Difference]:
    found, expected = buffers
    from_output: list[ReadRequest] = []
    from_source: list[ReadRequest] = []
    at = 0
    for span in batch:
        end = at + span.nbytes
        from_output.append((span.written, span.written_offset, span.nbytes, found[at:end]))
        from_source.append((span.origin, span.origin_offset, span.nbytes, expected[at:end]))
        at = end
    reader.read_into(from_output)
    reader.read_into(from_source)
    if np.array_equal(found[:at], expected[:at]):
        return
    for span, (*_, left), (*_, right) in zip(batch, from_output, from_source, strict=True):
        unequal = np.not_equal(left, right)
        first = int(unequal.argmax())
        if unequal[first]:
            offset = span.written_offset + first
            yield Difference(span.written, offset, int(left[first]), int(right[first]), span.origin)


def _fetched(step: Step, reader: Reader) -> list[Bytes]:
    raws = [np.empty(nbytes, dtype=np.uint8) for _, _, nbytes in step.spans]
    reader.read_into(
        [(ref, start, n, raw) for (ref, start, n), raw in zip(step.spans, raws, strict=True)]
    )
    return raws


def _patch_fault(
    patch: Patch, written: TensorRef, found: Bytes, origin: TensorRef
) -> Iterator[Difference]:
    unequal = np.flatnonzero(found != patch.data)
    if unequal.size:
        at = int(unequal[0])
        values = int(found[at]), int(patch.data[at])
        yield Difference(written, patch.offset + at, *values, origin, is_computed=True)
