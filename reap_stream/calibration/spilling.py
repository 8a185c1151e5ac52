"""Files without a name that hold what memory has no room for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from reap_stream.checkpoint.disk import output_errors
from reap_stream.errors import ReadError

if TYPE_CHECKING:
    from pathlib import Path


def open_spill(path: Path, nbytes: int) -> int:
    """Make a file that vanishes with the process and whose disk space is already its own.

    Returns:
        Its descriptor; the name is gone already.

    Raises:
        OutputError: the file exists, cannot be made, or the disk is too small.
    """
    with output_errors(path, nbytes):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            path.unlink()
            if nbytes:
                _reserve(fd, nbytes)
        except OSError:
            os.close(fd)
            raise
    return fd


def _reserve(fd: int, nbytes: int) -> None:
    # Not every system can reserve space; there a full disk shows when hidden states are stored.
    allocate = getattr(os, "posix_fallocate", None)
    if allocate is None:
        os.ftruncate(fd, nbytes)
    else:
        allocate(fd, 0, nbytes)


def read_into(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer from byte `offset` of a file.

    Raises:
        ReadError: the file ended early or could not be read.
    """
    done = 0
    while done < len(buffer):
        count = _preadv(fd, buffer[done:], offset + done, path)
        if count == 0:
            raise ReadError(
                f"{path}: ended at byte {offset + done}, {offset + len(buffer)} bytes were expected"
            )
        done += count


def _preadv(fd: int, buffer: memoryview, offset: int, path: Path) -> int:
    try:
        return os.preadv(fd, [buffer], offset)
    except OSError as error:
        raise ReadError(f"{path}: cannot be read at byte {offset}: {error}") from error


def write_from(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Write a buffer at byte `offset` of a file.

    Raises:
        OutputError: it could not be written.
    """
    done = 0
    with output_errors(path, len(buffer)):
        while done < len(buffer):
            done += os.pwrite(fd, buffer[done:], offset + done)
