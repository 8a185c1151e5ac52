"""Tensors of experts that a checkpoint numbers behind those it has, and that nothing reads.

transformers writes gate and up projections even for the identity experts of longcat_flash, and
wants them back. They stay as they are, numbered on behind the experts that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from reap_stream.checkpoint.recipes import Patch, Result, Span, Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from reap_stream.checkpoint.recipes import Bytes
    from reap_stream.checkpoint.refs import TensorRef

_STEP_NBYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class SpareExpert:
    """The recipe of one tensor of such an expert.

    Attributes:
        ref: the tensor in the source.
        component: which part of its dotted name is the expert's number.
        behind: how many such experts come before this one.
    """

    ref: TensorRef
    component: int
    behind: int

    @property
    def place(self) -> str:
        """The source tensor in whose place it lies."""
        return self.ref.name

    def results(self, keep: int) -> Sequence[Result]:
        """The same tensor under a new number."""
        return [Result(self._name(keep), self.ref.dtype, self.ref.shape)]

    def steps(self, kept: Sequence[int]) -> Iterator[Step]:
        """Its bytes, some at a time."""
        name = self._name(len(kept))
        for begin in range(0, self.ref.nbytes, _STEP_NBYTES):
            span = Span(self.ref, begin, min(_STEP_NBYTES, self.ref.nbytes - begin))

            def compute(raws: Sequence[Bytes], begin: int = begin) -> Iterable[Patch]:
                return [Patch(name, begin, raws[0])]

            yield Step((span,), compute)

    def _name(self, keep: int) -> str:
        parts = self.ref.name.split(".")
        parts[self.component] = str(keep + self.behind)
        return ".".join(parts)
