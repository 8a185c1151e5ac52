"""AWQ: 4-bit codes in words across the rows of the weight, as AutoAWQ's ``gemm`` version has them.

Layout of a weight X.weight [N, K] in G groups of columns:

* ``X.qweight`` I32 [K, N/8]: codes of eight rows in the order 0, 2, 4, 6, 1, 3, 5, 7, lowest bits
  first, so that a kernel unpacks even and odd halves together;
* ``X.qzeros`` I32 [G, N/8]: zero points, packed alike;
* ``X.scales`` float [G, N].

value = (code − zero point) × scale. The versions ``gemv``, ``gemv_fast`` and ``llm-awq`` pack along
the columns in orders of their own and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats.base import Weight
from reap_stream.formats.rearranged import RearrangedCodes
from reap_stream.formats.word_columns import (
    bits_of,
    fitting_group,
    group_size,
    is_awq,
    missing_part,
    shape_fault,
    word_parts,
)

_BITS: Final = 4
_PER_WORD: Final = 8
# Packings of their own; `exllama`, `ipex` and `marlin` name kernels that repack the usual one.
_REFUSED: Final = frozenset({"gemv", "gemv_fast", "llm-awq"})


class Awq:
    """4-bit codes in words across the rows.

    Args:
        settings: the quantisation settings of config.json.
    """

    name = "awq"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._group_size = group_size(settings)
        self._version = str(settings.get("version") or settings.get("format") or "gemm").lower()

    def claim(self, name: str, tensors: Mapping[str, TensorRef]) -> Weight | None:
        """Claims `qweight` and what lies beside it, where it lies as AWQ has it."""
        parts = word_parts(name, tensors)
        if parts is None or not is_awq(parts, self._settings):
            return None
        codes = parts["codes"].shape
        shape = (codes[1] * _PER_WORD, codes[0]) if len(codes) == 2 else (0, 0)
        return Weight(f"{name.rpartition('.')[0]}.weight", shape, self, parts)

    def refusal(self, weight: Weight) -> str | None:
        """Refuses what is missing, other versions, and shapes that do not fit."""
        codes = weight.parts["codes"]
        if self._version in _REFUSED:
            return f"packed tensor {codes.name!r} is of AWQ's version {self._version!r}, not 'gemm'"
        missing = missing_part(weight.name, weight.parts)
        if missing is not None:
            return missing
        if bits_of(weight.parts) not in (None, _BITS):
            return f"packed tensor {codes.name!r} has codes of {bits_of(weight.parts)} bits, not 4"
        return self._shape_fault(weight)

    def decode(self, weight: Weight, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Subtracts zero points and multiplies by scales."""
        group = self._group(weight)
        assert group is not None
        RearrangedCodes(
            layout="awq",
            bits=_BITS,
            codes=parts["codes"],
            scale=parts["scale"],
            zero=parts["zero"],
            group=group,
        ).decode(out)

    def _group(self, weight: Weight) -> int | None:
        return fitting_group(weight.shape[1], weight.parts["scale"].shape[0], self._group_size)

    def _shape_fault(self, weight: Weight) -> str | None:
        rows, columns = weight.shape
        scale = weight.parts["scale"]
        groups = scale.shape[0] if scale.shape else 0
        expected = {
            "codes": (columns, rows // _PER_WORD),
            "scale": (groups, rows),
            "zero": (groups, rows // _PER_WORD),
        }
        fault = shape_fault((rows, columns), weight.parts, expected)
        if fault is not None:
            return fault
        group = self._group(weight)
        if not group or columns % _PER_WORD or (group % 2 and groups > 1):
            return (
                f"scale {scale.name!r} {list(scale.shape)} does not divide the {columns} columns "
                f"of {weight.name!r} into groups of an even size"
            )
        return None
