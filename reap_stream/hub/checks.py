"""What is held against the listing of a file, and against the disk that it goes to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from reap_stream.checkpoint.disk import free_nbytes
from reap_stream.checkpoint.providers import Origin
from reap_stream.errors import ReadError
from reap_stream.hub.listing import RemoteFile

_CHUNK_NBYTES: Final = 1 << 22


def check_room(directory: Path, name: str, nbytes: int) -> None:
    """Refuses to begin what the disk has no room for.

    Raises:
        ReadError: it has less.
    """
    free = free_nbytes(directory)
    if free < nbytes:
        raise ReadError(
            f"{directory}: the disk has {free} bytes free, {name} needs {nbytes}; make room, then"
            " try again"
        )


def check_hash(path: Path, file: RemoteFile, origin: Origin) -> None:
    """Refuses a file that is not what was listed, though it was fetched twice.

    Raises:
        ReadError: its length or hash is another.
    """
    if not is_right(path, file):
        raise ReadError(
            f"{origin}: {file.name}: what was fetched, twice, is not what the Hub lists"
            f" ({path.stat().st_size} bytes, {file.nbytes} listed, hash {file.identity}): a proxy or"
            " mirror alters it, or the disk is failing"
        )


def is_right(path: Path, file: RemoteFile) -> bool:
    """Whether a file has the length and the hash of the listing: SHA-256, or git's of a blob."""
    if path.stat().st_size != file.nbytes:
        return False
    digest = hashlib.sha256()
    if file.sha256 is None:
        digest = hashlib.sha1(f"blob {file.nbytes}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_NBYTES):
            digest.update(chunk)
    return digest.hexdigest() == file.identity
