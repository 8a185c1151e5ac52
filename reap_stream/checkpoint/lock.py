"""One process at a time: a lock that the system lets go when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from reap_stream.checkpoint.disk import output_errors
from reap_stream.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Lock:
    """An exclusive lock on a file; its holder's process id and machine stand in the file."""

    def __init__(self, descriptor: int) -> None:
        """Take over a locked file; use `acquire`."""
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, path: Path) -> Lock:
        """Lock a file, made if need be, without waiting.

        Raises:
            UsageError: another process holds it; the message names the process.
            OutputError: the file could not be made or locked.
        """
        with output_errors(path):
            descriptor = _open_locked(path)
            while not _is_at(path, descriptor):
                # Its last holder deleted the file between our opening and locking it.
                os.close(descriptor)
                descriptor = _open_locked(path)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} on {os.uname().nodename}".encode(), 0)
        return cls(descriptor)

    @classmethod
    def join(cls, path: Path) -> Lock:
        """Lock a file that is there together with others that join; see `check_left`.

        Raises:
            OutputError: the file is not there, or could not be locked.
        """
        with output_errors(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise
        return cls(descriptor)

    def release(self) -> None:
        """Let go; may be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def discard(self, path: Path) -> None:
        """Delete the file, then let go.

        Args:
            path: the file.
        """
        # In this order, so that nobody locks a file that is about to go; and before its directory is
        # deleted, since network file systems leave a file there as long as somebody has it open.
        path.unlink(missing_ok=True)
        self.release()

    @contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Let go if the block fails, keep the lock if it does not."""
        try:
            yield
        except BaseException:
            self.release()
            raise


def check_left(path: Path) -> None:
    """Refuse to go on while a process that joined in a file's lock is still there.

    Raises:
        UsageError: there is one: a rank of an earlier run whose first rank ended before it.
        OutputError: the file could not be opened or locked.
    """
    with output_errors(path):
        try:
            # NFS locks exclusively only what is open for writing.
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{path.parent}: a rank of an earlier run has not ended yet; wait for it or stop it"
            ) from error
        finally:
            os.close(descriptor)


def _open_locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 300, 0).decode(errors="replace") or "unknown"
        os.close(descriptor)
        raise UsageError(
            f"{path.parent}: process {holder} is working on this output; "
            "wait for it, stop it, or choose another --output"
        ) from error
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
