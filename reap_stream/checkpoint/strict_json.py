"""JSON from strangers: one reading or none.

Python's parser takes the last of two equal keys, accepts NaN, guesses UTF-16 and converts numbers
of any length. Another reader of the same file may decide otherwise, so everything two readers
could disagree about is refused here, for headers, indexes and configs alike.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from reap_stream.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

MAX_JSON_NBYTES: Final = 100_000_000
"""Longest JSON text accepted: the safetensors library's own limit for a header."""

_MAX_INT_DIGITS: Final = 40
_SURROGATE_ESCAPE: Final = re.compile(r"\\u[dD][89a-fA-F]")


class _RefusedError(ValueError):
    """Raised inside the parser's hooks; becomes a `CheckpointError` before anyone else sees it."""


def shown(value: object) -> str:
    """Return `value` quoted for a message: control characters escaped, length bounded."""
    try:
        text = repr(value)
    except RecursionError:
        # Nesting that just fitted the parser may no longer fit here, a few calls further down.
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}…"


def parse_object(raw: bytes, where: Path, *, finite: bool = True) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        raw: the whole text, UTF-8.
        where: the file it came from, for messages.
        finite: refuse the constants NaN, Infinity and -Infinity, which JSON does not have. They
            are let through for config.json alone, where Mamba families write `Infinity`.

    Raises:
        CheckpointError: too long, not UTF-8, not JSON, not an object, text after it, a key given
            twice at any depth, a number of over 40 digits, nesting beyond Python's recursion
            limit, or half of a surrogate pair (which no UTF-8 file can hold).
    """
    if len(raw) > MAX_JSON_NBYTES:
        raise CheckpointError(
            f"{where}: JSON of {len(raw)} bytes; at most {MAX_JSON_NBYTES} are accepted"
        )
    try:
        text = raw.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_short_int,
            parse_constant=_no_constant if finite else float,
        )
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _RefusedError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except UnicodeError as error:
        raise CheckpointError(f"{where}: not valid UTF-8: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: JSON nested too deeply to be read") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object is expected, not {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise _RefusedError(f"key {shown(key)} stands twice in one JSON object; keep one")
        seen.add(key)
    return value


def _short_int(digits: str) -> int:
    if len(digits) > _MAX_INT_DIGITS:
        raise _RefusedError(
            f"number of {len(digits)} digits; at most {_MAX_INT_DIGITS} are accepted"
        )
    return int(digits)


def _no_constant(name: str) -> float:
    raise _RefusedError(f"{name} is not JSON; replace it with a number or a string")
