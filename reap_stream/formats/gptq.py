"""GPTQ: integer codes of 4 or 8 bits in words down the columns (AutoGPTQ, GPTQModel, AutoRound).

Layout of a weight X.weight [N, K] in G groups of columns, p = 32 / bits codes in a word:

* ``X.qweight`` I32 [K/p, N]: p neighbours of one row, lowest bits first;
* ``X.qzeros`` I32 [G, N/p]: zero points, packed across the rows;
* ``X.scales`` float [G, N];
* ``X.g_idx`` I32 [K]: the group of each column. With ``desc_act`` columns were quantised in the
  order of their activations, and neighbours are of different groups.

value = (code − zero point) × scale. Files of ``checkpoint_format: gptq``, the first and usual one,
hold one less than the zero point; ``gptq_v2`` holds it as it is. The one is added to the word as to
one number, since GPTQModel takes it off so: a zero point of 0 borrows from its neighbour. (AutoGPTQ
could not write 0 at all.) AutoRound writes the first form for ``auto_round:auto_gptq`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.errors import CheckpointError
from reap_stream.formats.base import Weight
from reap_stream.formats.rearranged import WORD_BITS, RearrangedCodes
from reap_stream.formats.word_columns import (
    bits_of,
    fitting_group,
    group_size,
    is_awq,
    missing_part,
    shape_fault,
    word_parts,
)

_BITS: Final = (4, 8)
_ZERO_OFFSETS: Final = {"gptq": 1, "gptq_v2": 0}


class Gptq:
    """Integer codes in words down the columns.

    Args:
        settings: the quantisation settings of config.json.
    """

    name = "gptq"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._group_size = group_size(settings)
        self._stored_as = str(settings.get("checkpoint_format") or "gptq")
        packing = str(settings.get("packing_format") or "")
        if "round" in str(settings.get("quant_method")) or "round" in packing:
            self._stored_as = "gptq" if "auto_gptq" in packing else "gptq_v2"

    def claim(self, name: str, tensors: Mapping[str, TensorRef]) -> Weight | None:
        """Claims `qweight` and what lies beside it, where it does not lie as AWQ has it."""
        parts = word_parts(name, tensors)
        if parts is None or is_awq(parts, self._settings):
            return None
        codes, bits = parts["codes"], bits_of(parts) or _BITS[0]
        shape = (0, 0)
        if len(codes.shape) == 2:
            shape = (codes.shape[1], codes.shape[0] * WORD_BITS // bits)
        return Weight(f"{name.rpartition('.')[0]}.weight", shape, self, parts)

    def refusal(self, weight: Weight) -> str | None:
        """Refuses what is missing, other bits, other packings, and shapes that do not fit."""
        parts = weight.parts
        missing = missing_part(weight.name, parts)
        if missing is not None:
            return missing
        if self._stored_as not in _ZERO_OFFSETS:
            return (
                f"packed tensor {parts['codes'].name!r}: checkpoint_format {self._stored_as!r} is "
                f"not one of {', '.join(_ZERO_OFFSETS)}"
            )
        bits = bits_of(parts)
        if bits not in _BITS:
            return (
                f"packed tensor {parts['codes'].name!r} with {parts['zero'].name!r} "
                f"{list(parts['zero'].shape)} does not show codes of 4 or 8 bits, but of {bits}"
            )
        return self._shape_fault(weight, bits)

    def decode(self, weight: Weight, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Subtracts zero points and multiplies by scales, whatever the order of the groups."""
        bits = bits_of(weight.parts)
        group = self._group(weight)
        assert bits is not None
        assert group is not None
        RearrangedCodes(
            layout="gptq",
            bits=bits,
            codes=parts["codes"],
            scale=parts["scale"],
            zero=parts["zero"],
            group=group,
            zero_offset=_ZERO_OFFSETS[self._stored_as],
            group_of=_scattered(weight, parts.get("order"), group),
        ).decode(out)

    def _group(self, weight: Weight) -> int | None:
        groups = weight.parts["scale"].shape[0]
        # A group size of 0, were there no columns, would mean none.
        return fitting_group(weight.shape[1], groups, self._group_size)

    def _shape_fault(self, weight: Weight, bits: int) -> str | None:
        rows, columns = weight.shape
        per_word = WORD_BITS // bits
        groups = weight.parts["scale"].shape[0]
        expected = {
            "codes": (columns // per_word, rows),
            "scale": (groups, rows),
            "zero": (groups, rows // per_word),
            "order": (columns,),
        }
        fault = shape_fault((rows, columns), weight.parts, expected)
        group = self._group(weight)
        if fault is None and (not group or rows % per_word or (group % 2 and groups > 1)):
            scale = weight.parts["scale"]
            fault = (
                f"scale {scale.name!r} {list(scale.shape)} does not divide the {columns} columns "
                f"of {weight.name!r} into groups of an even size"
            )
        return fault


def _scattered(weight: Weight, order: torch.Tensor | None, group: int) -> torch.Tensor | None:
    """The group of each column; None where they are in order."""
    if order is None:
        return None
    columns, groups = weight.shape[1], weight.parts["scale"].shape[0]
    if torch.equal(order, torch.arange(columns, device=order.device, dtype=order.dtype) // group):
        return None
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= groups:
        ref = weight.parts["order"]
        message = (
            f"{ref.file}: {ref.name!r} names groups {low} to {high}, "
            f"{weight.parts['scale'].name!r} has {groups}"
        )
        raise CheckpointError(message)
    return order
