"""The calibration SPEC: the text with which a user names calibration data.

    PATH[:N]                      a .jsonl, .parquet, .txt or .npy file
    HUB_ID[CONFIG](SPLIT):N       a data set on the Hub; [CONFIG], (SPLIT) and :N may be left out
    HUB_ID@REVISION...            the same at a branch, tag or commit
    builtin[:NAME][:N]            text that the package ships

N is the most rows to take, or with packing the most packs. A path that exists wins over every other
reading, so a file whose name holds a colon, or that is called ``builtin``, can still be used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reap_stream.calibration.builtin import BUILTIN_NAMES, DEFAULT_BUILTIN
from reap_stream.errors import UsageError

FILE_SUFFIXES = (".jsonl", ".npy", ".parquet", ".txt")

_ROWS = re.compile(r"(?P<stem>.+):(?P<rows>[0-9]{1,18})", re.DOTALL)
_BUILTIN = re.compile(r"builtin(?::(?P<name>.*))?", re.DOTALL)
_HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB = re.compile(
    rf"(?P<id>{_HUB_NAME}(?P<org>/{_HUB_NAME})?)(?:@(?P<revision>[^@\[\]()\s]+))?"
    r"(?:\[(?P<config>[^\[\]()]+)\])?(?:\((?P<split>[^\[\]()]+)\))?"
)
_EXAMPLES = "such as calib.jsonl:512, tokens.npy, builtin:code:128 or org/name[config](train):1024"


@dataclass(frozen=True, slots=True)
class CalibrationSpec:
    """One parsed SPEC.

    Attributes:
        kind: where the rows come from.
        name: the file's path, the built-in text's name, or the data set's Hub id.
        text: the SPEC as given, which labels the scores it leads to.
        rows: the most rows to take; None where the SPEC has no ``:N``.
        config: configuration of a Hub data set.
        split: split of a Hub data set.
        revision: its branch, tag or commit.
    """

    kind: Literal["file", "builtin", "hub"]
    name: str
    text: str
    rows: int | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @property
    def path(self) -> Path:
        """The file to read; meaningful for `kind` ``"file"`` alone."""
        return Path(self.name)


def parse_spec(text: str) -> CalibrationSpec:
    """Read one SPEC.

    Args:
        text: the SPEC, e.g. ``"calib.jsonl:512"``.

    Returns:
        What it names. The file may be missing; `load_corpus` says so.

    Raises:
        UsageError: the text is no SPEC, N is 0, or there is no built-in text of that name.
    """
    if _exists(text):
        return CalibrationSpec("file", text, text)
    match = _ROWS.fullmatch(text)
    stem, rows = (match["stem"], int(match["rows"])) if match else (text, None)
    if rows == 0:
        raise UsageError(f"SPEC {text!r} asks for 0 rows: N must be at least 1")
    if _exists(stem) or Path(stem).suffix in FILE_SUFFIXES:
        return CalibrationSpec("file", stem, text, rows)
    builtin = _BUILTIN.fullmatch(stem)
    if builtin is not None:
        return CalibrationSpec("builtin", _builtin_name(builtin, text), text, rows)
    hub = _HUB.fullmatch(stem)
    # A bare word is far more often a mistyped path than a Hub id of the time before namespaces.
    if hub is None or not any(hub.group("org", "config", "split", "revision")):
        raise UsageError(
            f"{text!r} is no SPEC and no file of that name exists: give one {_EXAMPLES}"
        )
    parts = {part: hub[part] for part in ("config", "split", "revision")}
    return CalibrationSpec("hub", hub["id"], text, rows, **parts)


def _builtin_name(match: re.Match[str], text: str) -> str:
    name: str = DEFAULT_BUILTIN if match["name"] is None else match["name"]
    if name not in BUILTIN_NAMES:
        names = ", ".join(f"builtin:{known}" for known in BUILTIN_NAMES)
        raise UsageError(f"SPEC {text!r}: no built-in text {name!r}; there are {names}")
    return name


def _exists(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        # Too long for a path, or with a null byte: then it names no file.
        return False
