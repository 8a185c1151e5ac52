"""An append-only list of JSON objects, each on the disk before the next step begins.

A crash can tear only the line being written, which is the last one: it is cut off on opening, and
what it would have recorded is done again. A torn line anywhere else means that something other
than a crash was at work, and is refused.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from reap_stream.checkpoint.disk import output_errors, sync_directory
from reap_stream.errors import ResumeError

if TYPE_CHECKING:
    from pathlib import Path


class Journal:
    """The lines of one file, held in memory too.

    Attributes:
        entries: the lines, oldest first.
    """

    def __init__(self, path: Path) -> None:
        """Open a journal, made on the first `append`; a torn last line is cut off the file.

        Raises:
            ResumeError: a line before the last is damaged.
            OutputError: the file could not be read or cut.
        """
        self._path = path
        with output_errors(path):
            raw = path.read_bytes() if path.exists() else b""
            self.entries, self._nbytes = _parse(raw, path)
            if self._nbytes < len(raw):
                os.truncate(path, self._nbytes)

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry; it is on the disk when this returns.

        Raises:
            OutputError: it could not be written; the journal is as it was before.
        """
        line = json.dumps(entry).encode() + b"\n"
        with output_errors(self._path, len(line)):
            try:
                with self._path.open("ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                # Otherwise the next line would be glued to the torn half of this one.
                os.truncate(self._path, self._nbytes)
                raise
            if not self._nbytes:
                # The file is new: its name must be durable too.
                sync_directory(self._path.parent)
        self._nbytes += len(line)
        self.entries.append(entry)


def _parse(raw: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines and the bytes they fill."""
    entries: list[dict[str, Any]] = []
    nbytes = 0
    lines = raw.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        entry = _entry(line)
        if entry is None and number < len(lines):
            raise ResumeError(
                f"{path}: line {number} of {len(lines)} is damaged: {line[:80]!r}; "
                "start anew with --overwrite"
            )
        if entry is not None:
            entries.append(entry)
            nbytes += len(line)
    return entries, nbytes


def _entry(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
