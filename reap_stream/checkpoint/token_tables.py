"""Tables that send each token to fixed experts, rewritten for the experts that stay.

Some families (DeepSeek-V4's first layers) do not choose experts by what a token means but look
them up: row t of a table [vocabulary, experts per token] names the experts of token id t. An entry
of an expert that stays gets that expert's new number. The others are hashed anew, as the table was
made in the first place: the entry in column c of row t goes to the kept expert number (t + c) mod
kept, or the next one that the row does not name yet. So rows name different experts as before,
and what the removed experts did is spread evenly over those that stay. The rule needs the table
and the kept experts alone: pruning, compaction and verification come to the same table.

    experts 0..5, kept [1, 2, 4, 5] = new 0..3:   row 7: [2, 3] → [1, (7 + 1) mod 4 = 0] = [1, 0]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from reap_stream.checkpoint.recipes import Patch, Result, Span, Step
from reap_stream.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from reap_stream.checkpoint.recipes import Bytes
    from reap_stream.checkpoint.refs import TensorRef

_DTYPES: Final = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1", "U16": "<u2", "U32": "<u4"}
_STEP_ROWS: Final = 1 << 16

Table = np.ndarray[Any, np.dtype[np.int64]]


def remapped(table: Table, kept: Sequence[int], num_experts: int, first: int = 0) -> Table:
    """A part of a table for the experts that stay.

    Args:
        table: int64 [rows, columns] expert numbers of the source.
        kept: source numbers of the experts that stay, rising; at least as many as columns.
        num_experts: experts of the source.
        first: token id of the first row.

    Returns:
        int64 [rows, columns] new expert numbers.
    """
    new_numbers = np.full(num_experts, -1, dtype=np.int64)
    new_numbers[list(kept)] = np.arange(len(kept))
    made = new_numbers[table]
    tokens = np.arange(first, first + len(table))
    for column in range(table.shape[1]):
        rows = np.flatnonzero(made[:, column] < 0)
        choice = (tokens[rows] + column) % len(kept)
        while (taken := (made[rows] == choice[:, None]).any(axis=1)).any():
            choice[taken] = (choice[taken] + 1) % len(kept)
        made[rows, column] = choice
    return made


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The recipe of one table; see the module's text.

    Attributes:
        ref: the table in the source.
        num_experts: experts of the source.
    """

    ref: TensorRef
    num_experts: int

    def __post_init__(self) -> None:
        """Refuses a dtype that numbers do not have.

        Raises:
            UnsupportedError: it is one.
        """
        if self.ref.dtype not in _DTYPES:
            raise UnsupportedError(
                f"{self.ref.file}: tensor {self.ref.name!r} names experts by number, but is "
                f"{self.ref.dtype}; expected one of {', '.join(_DTYPES)}"
            )

    @property
    def place(self) -> str:
        """The source tensor in whose place the table lies."""
        return self.ref.name

    def results(self, keep: int) -> Sequence[Result]:
        """The table keeps name, dtype and shape, whatever stays."""
        del keep
        return [Result(self.ref.name, self.ref.dtype, self.ref.shape)]

    def steps(self, kept: Sequence[int]) -> Iterator[Step]:
        """A step for some thousand rows each."""
        rows, columns = self.ref.shape
        row_nbytes = self.ref.nbytes // rows if rows else 0
        for first in range(0, rows, _STEP_ROWS):
            count = min(_STEP_ROWS, rows - first)
            span = Span(self.ref, first * row_nbytes, count * row_nbytes)

            def compute(raws: Sequence[Bytes], first: int = first) -> Iterable[Patch]:
                table = raws[0].view(_DTYPES[self.ref.dtype]).reshape(-1, columns)
                made = self._checked(table.astype(np.int64), kept, first).astype(table.dtype)
                data = np.ascontiguousarray(made).reshape(-1).view(np.uint8)
                return [Patch(self.ref.name, first * row_nbytes, data)]

            yield Step((span,), compute)

    def _checked(self, table: Table, kept: Sequence[int], first: int) -> Table:
        low, high = int(table.min()), int(table.max())
        if low < 0 or high >= self.num_experts:
            raise CheckpointError(
                f"{self.ref.file}: tensor {self.ref.name!r} names expert {low if low < 0 else high}"
                f", the model has {self.num_experts}"
            )
        return remapped(table, kept, self.num_experts, first)
