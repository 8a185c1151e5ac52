"""The one table of dtypes: safetensors tag to bits per element, and a shape's length in bytes.

Tags and widths are those of the `Dtype` enum in the safetensors library. Elements narrower than a
byte (``F4``, ``F6_*``) lie packed, so only shapes that fill whole bytes exist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from reap_stream.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPE_BITS: Final[dict[str, int]] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}

MAX_NBYTES: Final = 2**63 - 1
"""Longest tensor and longest file: what a signed 64-bit file offset can name."""


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes a tensor fills.

    Dimensions of zero do not hide absurd ones beside them: the product of all others is bounded
    too, because strides are computed from it later.

    Args:
        dtype: safetensors tag, a key of `DTYPE_BITS`.
        shape: logical shape; empty for a scalar.

    Raises:
        CheckpointError: unknown dtype, negative dimension, more than `MAX_NBYTES` bytes, or a
            sub-byte tensor that ends inside a byte. The message names neither file nor tensor:
            the caller, who knows them, adds them.
    """
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise CheckpointError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPE_BITS)}")
    nbits = bits
    for dim in shape:
        if dim < 0:
            raise CheckpointError(f"negative dimension {dim}")
        nbits *= dim or 1
        # Checked at every step: a long shape must not build a number of a million digits.
        if nbits > 8 * MAX_NBYTES:
            raise CheckpointError(f"shape needs more than the {MAX_NBYTES} bytes a file can have")
    if 0 in shape:
        return 0
    if nbits % 8:
        raise CheckpointError(
            f"{nbits // bits} elements of {bits} bits end inside a byte; whole bytes are needed"
        )
    return nbits // 8
