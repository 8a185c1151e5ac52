"""The directory of shards that are deleted after use: told apart from everything that is the user's.

    .NAME.reap-source/
        lock        held while a process works there; its holder's process id inside
        <commit>/   shards of that commit, whole ones and halves

It lies where the user keeps other files, and whole folders are deleted in it. So it is taken for
this package's own only if it holds nothing else, and nothing is reached through a link.
"""

from __future__ import annotations

import re
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from reap_stream.checkpoint.disk import output_errors, remove_if_empty
from reap_stream.checkpoint.lock import Lock
from reap_stream.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LOCK: Final = "lock"
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
# As `Lock` writes it; empty where a process ended between making the file and writing to it.
_HOLDER: Final = re.compile(rb"(\d+ on .*)?", re.DOTALL)
_HOLDER_NBYTES: Final = 300
_ADVICE: Final = "move it away, or choose another --output"


def check_work_directory(work: Path) -> None:
    """Refuses a directory that this package did not make.

    Raises:
        UsageError: it is a link or a file, or holds anything but a lock and folders of commits.
        OutputError: it cannot be read.
    """
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise UsageError(f"{work}: is a link or a file, and shards are deleted there: {_ADVICE}")
    with output_errors(work):
        entries = sorted(work.iterdir()) if work.exists() else []
    for entry in entries:
        if not (_is_lock(entry) or _is_commit(entry)):
            raise UsageError(f"{entry}: is none of this package's files: {_ADVICE}")
    if entries and not any(entry.name == _LOCK for entry in entries):
        raise UsageError(f"{work}: holds no {_LOCK}, so it is not this package's: {_ADVICE}")


@contextmanager
def work_directory(work: Path, revision: str) -> Iterator[Path]:
    """The shards' directory: deleted when all went well, kept for the next run when not.

    Args:
        work: the directory, made if need be.
        revision: the commit; folders of others in it are deleted.

    Yields:
        The commit's folder.

    Raises:
        UsageError: another process uses the directory, or it is not this package's.
        OutputError: the disk refuses.
    """
    check_work_directory(work)
    own = work / revision
    if _COMMIT.fullmatch(revision) is None:
        raise UsageError(f"{own}: a commit has 40 hexadecimal digits")
    with output_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    lock = Lock.acquire(work / _LOCK)
    try:
        with output_errors(work):
            for entry in work.iterdir():
                if entry.name not in (_LOCK, revision):
                    _delete(entry, work)
            own.mkdir(exist_ok=True)
        yield own
        with output_errors(own):
            _delete(own, work)
    finally:
        with output_errors(work), lock.released_on_error():
            if _is_done(own, work):
                lock.discard(work / _LOCK)
                remove_if_empty(work)
        lock.release()


def _is_lock(path: Path) -> bool:
    if path.name != _LOCK or path.is_symlink() or not path.is_file():
        return False
    with output_errors(path), path.open("rb") as stream:
        return _HOLDER.fullmatch(stream.read(_HOLDER_NBYTES)) is not None


def _is_commit(path: Path) -> bool:
    return bool(_COMMIT.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()


def _delete(folder: Path, work: Path) -> None:
    """Delete a commit's folder; looked at once more, since hours may have gone by."""
    if folder.parent != work or work.is_symlink() or not _is_commit(folder):
        raise UsageError(f"{folder}: is no folder of shards in {work}: {_ADVICE}")
    shutil.rmtree(folder)


def _is_done(own: Path, work: Path) -> bool:
    """Whether nothing but the lock is left; a commit's folder without files is deleted."""
    if _is_commit(own):
        if any(path.is_file() for path in own.rglob("*")):
            return False
        _delete(own, work)
    return [entry.name for entry in work.iterdir()] == [_LOCK]
