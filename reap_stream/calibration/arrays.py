"""Rows of token ids from ``.npy`` files, taken as they are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tokenize import TokenError
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from reap_stream.calibration.sampling import Candidate
from reap_stream.errors import CalibrationError

# What numpy raises at a damaged header, which it reads as a Python literal.
_ARRAY_ERRORS: Final = (
    *(OSError, ValueError, TypeError, OverflowError, EOFError),
    *(SyntaxError, TokenError, RecursionError, MemoryError),
)


def array_rows(path: Path, vocab_size: int, most_tokens: int | None) -> Iterator[Candidate]:
    """Yield the rows of an int64 or int32 array [rows, tokens], each still to be copied.

    Args:
        path: the ``.npy`` file.
        vocab_size: every id must be below.
        most_tokens: where rows are cut; None: not at all.

    Raises:
        CalibrationError: no such array, or an id that the model does not know.
    """
    array = _open_array(path)
    for number in range(array.shape[0]):
        row = array[number].astype(np.int64)
        bad = np.flatnonzero((row < 0) | (row >= vocab_size))
        if bad.size:
            raise CalibrationError(
                f"{path}: token id {row[bad[0]]} at row {number}, column {bad[0]} is outside the"
                f" model's vocabulary of {vocab_size}: the ids are another tokenizer's"
            )
        yield partial(np.copy, row[:most_tokens])


def _open_array(path: Path) -> NDArray[Any]:
    try:
        # Mapped, so that a file much larger than the sample is never held; pickles are refused.
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except _ARRAY_ERRORS as error:
        raise CalibrationError(f"{path}: cannot be read as an array: {error}") from error
    if array.ndim != 2 or array.dtype not in (np.int64, np.int32):
        raise CalibrationError(
            f"{path}: {array.dtype} {list(array.shape)}: it must be int64 or int32 [rows, tokens]"
        )
    return array
