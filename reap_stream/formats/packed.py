"""Rows of 4-bit and 8-bit codes with a scale a group, decoded: what several formats have in common.

value = (number of the code − zero point) × scale, in float32, rounded once to the dtype of the
forward. The difference is exact. compressed-tensors rounds to the dtype of the scales instead; the
two agree bit for bit where the forward runs in that dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from reap_stream import _native
from reap_stream.formats.scales import looked_up

Code = Literal["e2m1", "u4", "u8"]

_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLE: Final = {"e2m1": 0.0, "u4": 8.0, "u8": 128.0}
_SCALE_TAGS: Final[dict[torch.dtype, Literal["bf16", "f16", "f32"]]] = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
}


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A matrix [rows, columns] of packed codes.

    Attributes:
        code: what a code is.
        codes: uint8 [rows, bytes], of two 4-bit codes in a byte the low half first.
        scale: [rows, groups], a float dtype, or any one-byte dtype where there is a table.
        table: float32 [256], the scale that each byte stands for.
        zero: uint8 [rows, groups]; None: the middle of the codes.
        group: columns that share a scale.
    """

    code: Code
    codes: torch.Tensor
    scale: torch.Tensor
    group: int
    table: torch.Tensor | None = None
    zero: torch.Tensor | None = None

    def decode(self, out: torch.Tensor) -> None:
        """Writes the values into `out` [rows, columns]: the extension on the CPU, torch elsewhere."""
        if out.device.type != "cpu" or out.dtype == torch.float16 or not out.is_contiguous():
            out.copy_(self._values(out.shape[1]))
            return
        rows, columns = out.shape
        tag: Literal["bf16", "f32"] = "bf16" if out.dtype == torch.bfloat16 else "f32"
        _native.packed_decode(
            self.codes.contiguous().numpy(),
            self.code,
            _bytes(self.scale),
            _SCALE_TAGS[self.scale.dtype] if self.table is None else "u8",
            None if self.table is None else self.table.numpy(),
            None if self.zero is None else self.zero.contiguous().numpy(),
            _bytes(out),
            rows,
            columns,
            self.group,
            self.codes.shape[1],
            tag,
            threads=torch.get_num_threads(),
        )

    def numbers(self, columns: int) -> torch.Tensor:
        """What the codes stand for, zero points apart: float32 [rows, columns]."""
        if self.code == "u8":
            return self.codes[:, :columns].to(torch.float32)
        pairs = torch.stack((self.codes & 0xF, self.codes >> 4), dim=-1)
        nibbles = pairs.reshape(len(self.codes), -1)[:, :columns]
        if self.code == "u4":
            return nibbles.to(torch.float32)
        values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=nibbles.device)
        return values[nibbles.long()]

    def _values(self, columns: int) -> torch.Tensor:
        scale = self.scale if self.table is None else looked_up(self.scale, self.table)
        values = self.numbers(columns)
        zero = _MIDDLE[self.code] if self.zero is None else self._spread(self.zero, columns)
        return (values - zero) * self._spread(scale, columns)

    def _spread(self, grid: torch.Tensor, columns: int) -> torch.Tensor:
        wide = grid.to(torch.float32).repeat_interleave(self.group, 1)
        return wide[:, :columns]


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy()
