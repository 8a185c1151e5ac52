"""What the system says about the disk: room, failures, and names made durable."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from reap_stream.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def output_errors(path: Path, nbytes: int | None = None) -> Iterator[None]:
    """Turn what the system says about writing into an `OutputError`.

    Args:
        path: the file or directory being written, named in the message.
        nbytes: bytes that are to be written, if known; named where the disk is full.

    Raises:
        OutputError: with the path, the system's reason, and on a full disk both numbers.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise OutputError(f"{path}: could not be written: {error}") from error
        needed = "" if nbytes is None else f"{nbytes} bytes are needed, "
        raise OutputError(
            f"{path}: the disk is full or over quota: {needed}"
            f"{free_nbytes(path)} bytes are free; make room and go on with --resume"
        ) from error


def free_nbytes(path: Path) -> int:
    """Bytes an ordinary user may still write to the disk that holds, or would hold, `path`."""
    return shutil.disk_usage(_existing(path)).free


def on_one_disk(path: Path, other: Path) -> bool:
    """Whether two paths, which need not exist yet, share a disk."""
    return _existing(path).stat().st_dev == _existing(other).stat().st_dev


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def remove_if_empty(path: Path) -> None:
    """Delete a directory in which nobody has begun anything anew.

    Raises:
        OSError: the caller translates it.
    """
    try:
        path.rmdir()
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}:
            raise


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable.

    File systems that cannot sync a directory say so with EINVAL or ENOTSUP; they need not.

    Raises:
        OSError: the caller translates it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)
