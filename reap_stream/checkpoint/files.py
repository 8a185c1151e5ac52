"""Which files of a checkpoint directory may be opened at all, and opening them without blocking.

A checkpoint is somebody else's directory. A link in it could name any file of the user's machine,
which would then be copied and published; a FIFO in it would hang the run. So each file is
resolved and placed before it is opened, and opened in a way that cannot wait.
"""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from reap_stream.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """Open a regular file for reading and yield (file descriptor, length in bytes).

    Raises:
        CheckpointError: missing, unreadable, or not a regular file; never waits on a FIFO.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: {_kind(status.st_mode)}, not a regular file")
        yield fd, status.st_size
    finally:
        os.close(fd)


def pread_exact(fd: int, nbytes: int, offset: int, path: Path) -> bytes:
    """Return exactly `nbytes` bytes from `offset`.

    Raises:
        CheckpointError: the file ended early or the read failed.
    """
    parts: list[bytes] = []
    done = 0
    while done < nbytes:
        try:
            part = os.pread(fd, nbytes - done, offset + done)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read at byte {offset + done}: {error}"
            ) from error
        if not part:
            raise CheckpointError(
                f"{path}: ended at byte {offset + done}, {offset + nbytes} bytes were expected;"
                " it shrank while it was read"
            )
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def read_small(path: Path, max_nbytes: int) -> bytes:
    """Return the whole of a file of at most `max_nbytes` bytes.

    Raises:
        CheckpointError: longer than that, or what `open_regular` raises.
    """
    with open_regular(path) as (fd, nbytes):
        if nbytes > max_nbytes:
            raise CheckpointError(f"{path}: {nbytes} bytes; at most {max_nbytes} are accepted")
        return pread_exact(fd, nbytes, 0, path)


def check_contained(path: Path, directory: Path) -> None:
    """Refuse a path whose links lead out of the checkpoint.

    Allowed are targets inside `directory`, and inside the ``blobs`` folder of a Hub cache when
    `directory` lies under the ``snapshots`` folder beside it
    (``snapshots/<revision>/file -> ../../blobs/<hash>``).

    Raises:
        CheckpointError: the target is elsewhere or does not exist, or the links form a loop.
    """
    try:
        root = directory.resolve(strict=True)
        target = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: missing, or a link to nothing: {error}") from error
    allowed = [root, *(p.parent / "blobs" for p in root.parents if p.name == "snapshots")]
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise CheckpointError(
            f"{path}: leads to {target}, outside the checkpoint {root}; replace the link with the file"
        )


def _kind(mode: int) -> str:
    names = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    return names.get(stat.S_IFMT(mode), "a special file")
