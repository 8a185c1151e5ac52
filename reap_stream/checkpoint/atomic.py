"""A file that is there whole or not at all, whenever the machine stops."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from reap_stream.checkpoint.disk import output_errors, sync_directory


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview], nbytes: int) -> None:
    """Write a file beside its place, make it durable, then rename it into place.

    A file already there is replaced, and stays as it was if anything fails.

    Args:
        path: where the file shall lie; its directory must exist.
        chunks: the bytes in order; one chunk at a time is asked for and held.
        nbytes: their length together, for the message of a full disk.

    Raises:
        OutputError: the file could not be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with output_errors(path, nbytes):
            with partial.open("wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_directory(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink()
