"""What GPTQ and AWQ files have in common: ``qweight``, ``qzeros`` and ``scales`` beside each other.

Names are the same in both; which it is shows in the shapes. For a weight [N, K] in G groups, with p
codes in a 32-bit word:

                 qweight      qzeros       scales    g_idx
    GPTQ   I32   [K/p, N]     [G, N/p]     [G, N]    [K], the group of each column
    AWQ    I32   [K, N/8]     [G, N/8]     [G, N]    none
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats.rearranged import WORD_BITS

_ROLES: Final = {"zero": "qzeros", "scale": "scales", "order": "g_idx"}
_SCALE_DTYPES: Final = ("F16", "BF16", "F32")
_AWQ_CODES: Final = 8


def word_parts(name: str, tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef] | None:
    """The tensors of the weight whose codes are `name`, by role; None where it is no `qweight`."""
    module, _, leaf = name.rpartition(".")
    if leaf != "qweight":
        return None
    parts = {"codes": tensors[name]}
    for role, companion in _ROLES.items():
        found = tensors.get(f"{module}.{companion}")
        if found is not None:
            parts[role] = found
    return parts


def is_awq(parts: Mapping[str, TensorRef], settings: Mapping[str, Any]) -> bool:
    """Whether codes lie as AWQ has them; by the settings only where shapes do not tell."""
    codes, scale = parts["codes"].shape, parts["scale"].shape if "scale" in parts else ()
    if len(codes) == 2 and len(scale) == 2:
        if codes[1] == scale[1]:
            return False
        if codes[1] * _AWQ_CODES == scale[1]:
            return True
    said = f"{settings.get('quant_method')} {settings.get('packing_format')}".lower()
    return "awq" in said


def group_size(settings: Mapping[str, Any]) -> int | None:
    """Columns that share a scale, as the settings say; None where they say nothing, or all of K.

    Other formats have a key of that name too (AutoRound's FP8: a list), so what is no number says
    nothing here; shapes tell the size wherever it divides K.
    """
    size = settings.get("group_size", settings.get("q_group_size"))
    return size if type(size) is int and size > 0 else None


def fitting_group(columns: int, groups: int, said: int | None) -> int | None:
    """Columns of each of `groups` groups; None where no size makes as many."""
    if said is not None and -(-columns // said) == groups:
        return said
    return columns // groups if groups and columns % groups == 0 else None


def missing_part(name: str, parts: Mapping[str, TensorRef]) -> str | None:
    """Why codes cannot be decoded for want of scales or zero points."""
    for role in ("scale", "zero"):
        if role not in parts:
            module = parts["codes"].name.rpartition(".")[0]
            return (
                f"packed tensor {parts['codes'].name!r} of {name!r} has no {module}.{_ROLES[role]}"
            )
    return None


def shape_fault(
    weight_shape: tuple[int, int],
    parts: Mapping[str, TensorRef],
    expected: Mapping[str, tuple[int, ...]],
) -> str | None:
    """What is wrong with dtypes and shapes of words, zero points, scales and order."""
    for role, shape in expected.items():
        ref = parts.get(role)
        if ref is None:
            continue
        dtypes = _SCALE_DTYPES if role == "scale" else ("I32",)
        if ref.dtype not in dtypes or ref.shape != shape:
            return (
                f"{ref.name!r} is {ref.dtype} {list(ref.shape)}, expected {' or '.join(dtypes)} "
                f"{list(shape)} for a weight {list(weight_shape)}"
            )
    return None


def bits_of(parts: Mapping[str, TensorRef]) -> int | None:
    """Bits of a code, from how many words hold the zero points of N rows; None if it shows none."""
    zero, scale = parts.get("zero"), parts.get("scale")
    if zero is None or scale is None or len(zero.shape) != 2 or len(scale.shape) != 2:
        return None
    rows = scale.shape[1]
    exact = rows > 0 and zero.shape[1] * WORD_BITS % rows == 0
    return zero.shape[1] * WORD_BITS // rows if exact else None
