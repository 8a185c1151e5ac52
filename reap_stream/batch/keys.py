"""The keys of a job: options of the command line as TOML has them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from reap_stream.checkpoint.strict_json import shown
from reap_stream.errors import UsageError
from reap_stream.hub.names import parse_hub_name

Values = tuple[str, ...]
"""What stands behind an option, once for each time it is given; ``("",)`` of a flag."""


def _text(value: Any) -> Values | None:
    # No argument of a command can hold a null.
    return (value,) if isinstance(value, str) and value and "\0" not in value else None


def _count(value: Any) -> Values | None:
    return (str(value),) if type(value) is int else None


def _number(value: Any) -> Values | None:
    return (repr(value),) if type(value) in (int, float) else None


def _nbytes(value: Any) -> Values | None:
    return _text(value) or _count(value)


def _flag(value: Any) -> Values | None:
    if type(value) is not bool:
        return None
    return ("",) if value else ()


def _texts(value: Any) -> Values | None:
    parts = [_text(part) for part in value] if isinstance(value, list) else [_text(value)]
    texts = [part[0] for part in parts if part]
    return tuple(texts) if texts and len(texts) == len(parts) else None


def _targets(value: Any) -> Values | None:
    parts = value if isinstance(value, list) else [value]
    texts = [_text(part) or _number(part) for part in parts]
    return (",".join(text[0] for text in texts if text),) if texts and all(texts) else None


def _weights(value: Any) -> Values | None:
    if not isinstance(value, dict):
        return _text(value)
    entries = [(label, _number(weight)) for label, weight in value.items()]
    if not entries or not all(weight for _, weight in entries):
        return None
    return (",".join(f"{label}={weight[0]}" for label, weight in entries if weight),)


def _text_or_none(value: Any) -> Values | None:
    return () if value is False else _text(value)


def _page(value: Any) -> Values | None:
    return _flag(value) if type(value) is bool else _text(value)


def _evaluation(value: Any) -> Values | None:
    """SPECs of text; those of a table are read by themselves, with its other options."""
    if isinstance(value, dict):
        return _texts(value.get("text"))
    return () if value is False else _texts(value)


_Kind = tuple[str, Callable[[Any], Values | None]]
_TEXT: Final[_Kind] = ("a text", _text)
_COUNT: Final[_Kind] = ("a whole number", _count)
_NUMBER: Final[_Kind] = ("a number", _number)
_NBYTES: Final[_Kind] = ('a size such as "8GiB"', _nbytes)
_FLAG: Final[_Kind] = ("true or false", _flag)
_TEXTS: Final[_Kind] = ("a text or a list of texts", _texts)
_TARGETS: Final[_Kind] = ("a number, or a list of numbers", _targets)
_TEXT_OR_NONE: Final[_Kind] = ("a text, or false,", _text_or_none)
_PAGE: Final[_Kind] = ("the name of a page, true or false", _page)
_EVAL: Final[_Kind] = ("text to evaluate on: SPECs, or a table with `text`, or false,", _evaluation)
_WEIGHTS: Final[_Kind] = ("a table of numbers by source, or a text", _weights)

# Options of how the model is run: where they are the same, so are the scores.
PASS: Final[Mapping[str, _Kind]] = {
    "calibration": _TEXTS,
    "map": _TEXTS,
    "pack": _FLAG,
    "samples": _COUNT,
    "sequence-length": _COUNT,
    "batch-tokens": _COUNT,
    "device": _TEXT,
    "compute-dtype": _TEXT,
    "memory": _NBYTES,
    "propagate": _TEXT,
}
# Options of what is chosen and written, which `compact` has as well.
WRITING: Final[Mapping[str, _Kind]] = {
    "sparsity": _TARGETS,
    "keep": _TARGETS,
    "method": _TEXT,
    "source-weights": _WEIGHTS,
    "protect": _TEXT,
    "seed": _COUNT,
    "weights": _TEXT,
    "fp8-experts-only": _FLAG,
    "max-shard-size": _NBYTES,
    "mtp": _TEXT,
    "snapshot-minutes": _NUMBER,
    "trust-remote-code": _FLAG,
    "evict": _FLAG,
}
# Options of `upload`.
UPLOADING: Final[Mapping[str, _Kind]] = {
    "public": _FLAG,
    "revision": _TEXT,
    "commit-message": _TEXT,
}
# What is no option of prune.
OWN: Final[Mapping[str, _Kind]] = {
    "name": _TEXT,
    "model": _TEXT,
    "output": _TEXT,
    "overwrite": _FLAG,
    "verify": _FLAG,
    "eval": _EVAL,
    "report": _PAGE,
    "card": _FLAG,
    "base-model": _TEXT,
    "upload": _TEXT_OR_NONE,
    **UPLOADING,
}
KEYS: Final[Mapping[str, _Kind]] = {**OWN, **PASS, **WRITING}
# Options of `eval`; but for the text, those of the job where the table does not have them.
EVALUATING: Final[Mapping[str, _Kind]] = {
    "text": _TEXTS,
    **{key: kind for key, kind in PASS.items() if key not in ("calibration", "propagate")},
    "seed": _COUNT,
    "evict": _FLAG,
}


def read_value(
    key: str, value: Any, where: str, keys: Mapping[str, _Kind] = KEYS
) -> Values:  # fmt: skip
    """The values of a key as the command line has them.

    Args:
        key: the key.
        value: as TOML has it.
        where: names the table, for messages.
        keys: those that the table may have.

    Raises:
        UsageError: no such key, or a value of another kind.
    """
    if key not in keys:
        near = difflib.get_close_matches(key.replace("_", "-"), keys, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": there are {', '.join(sorted(keys))}"
        raise UsageError(f"{where}: no key {shown(key)}{hint}")
    kind, read = keys[key]
    found = read(value)
    if found is None:
        raise UsageError(f"{where}: {key} is {shown(value)}, {kind} is expected")
    return found


def base_name(model: str) -> str:
    """What a model is called in names of outputs: its last part, without a revision."""
    name = parse_hub_name(model)
    return Path(model if name is None else name.repository).name
