"""Integer codes that do not lie row after row, decoded: what GPTQ, AWQ and INT8 have in common.

value = (code − zero point) × scale, in float32, rounded once to the dtype of the forward. The
difference is exact. The libraries that own the formats multiply in the dtype of the scales, float16
mostly, and round there; given float32 scales they agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from reap_stream import _native

Layout = Literal["gptq", "awq", "int8"]

WORD_BITS: Final = 32
SCALE_TAGS: Final[dict[torch.dtype, Literal["bf16", "f16", "f32"]]] = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
}
# Where in an AWQ word the code of each of its eight rows lies.
_AWQ_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class RearrangedCodes:
    """A weight [N, K] of integer codes; `_native.rearranged_decode` says how each layout lies.

    Attributes:
        layout: what lies where.
        bits: bits of a code.
        codes: int32 words, or int8 [N, K].
        scale: [groups, N], of ``int8`` [N, groups]; a float dtype.
        zero: zero points, packed as the codes are; None: the middle of the codes.
        group: columns that share a scale.
        zero_offset: 1 where one less than each zero point is stored, word by word.
        group_of: int32 [K], the group of each column; None: in order.
    """

    layout: Layout
    bits: int
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group: int
    zero_offset: int = 0
    group_of: torch.Tensor | None = None

    def decode(self, out: torch.Tensor) -> None:
        """Writes the values into `out` [N, K]: the extension on the CPU, torch elsewhere."""
        if out.device.type != "cpu" or out.dtype == torch.float16 or not out.is_contiguous():
            out.copy_(self._values(*out.shape))
            return
        rows, columns = out.shape
        tag: Literal["bf16", "f32"] = "bf16" if out.dtype == torch.bfloat16 else "f32"
        _native.rearranged_decode(
            _bytes(self.codes),
            self.layout,
            self.bits,
            _bytes(self.scale),
            SCALE_TAGS[self.scale.dtype],
            None if self.zero is None else _bytes(self.zero),
            self.zero_offset,
            None if self.group_of is None else self.group_of.contiguous().numpy(),
            _bytes(out),
            rows,
            columns,
            self.group,
            tag,
            threads=torch.get_num_threads(),
        )

    def _values(self, rows: int, columns: int) -> torch.Tensor:
        """The same in torch, float32 [N, K]."""
        group_of = self.group_of
        if group_of is None:
            group_of = torch.arange(columns, device=self.codes.device) // self.group
        if self.layout == "int8":
            scale = self.scale.to(torch.float32).view(rows, -1)[:, group_of.long()]
            zero = 0 if self.zero is None else self.zero.view(rows, -1)[:, group_of.long()]
            return (self.codes.to(torch.float32) - zero) * scale
        if self.layout == "awq":
            codes = self._across(self.codes)
        else:
            shifts = self._shifts(WORD_BITS // self.bits)
            codes = ((self.codes[:, None, :] >> shifts[None, :, None]) & self._mask).flatten(0, 1)
        zeros: torch.Tensor | int = 1 << (self.bits - 1)
        if self.zero is not None:
            ones = sum(1 << shift for shift in range(0, WORD_BITS, self.bits)) * self.zero_offset
            zeros = self._across(self.zero + ones)[group_of.long()]
        scale = self.scale.to(torch.float32)[group_of.long()]
        return ((codes - zeros).to(torch.float32) * scale).t()

    def _across(self, words: torch.Tensor) -> torch.Tensor:
        """The codes of words whose codes lie side by side: int32 [.., words × codes in a word]."""
        per_word = WORD_BITS // self.bits
        shifts = self._shifts(per_word)
        if self.layout == "awq":
            shifts = shifts[list(_AWQ_PLACES)]
        return ((words[:, :, None] >> shifts) & self._mask).flatten(1)

    def _shifts(self, count: int) -> torch.Tensor:
        return torch.arange(count, dtype=torch.int32, device=self.codes.device) * self.bits

    @property
    def _mask(self) -> int:
        return (1 << self.bits) - 1


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
