"""One file of a repository onto the disk, held to the size and the hash that the Hub lists.

into the Hub's cache    `hf_hub_download`, as every program that shares the cache does it; what
                        is in the cache already is taken as it is, its length checked
into a work directory   for shards that are deleted once they are used. A transfer that was cut
                        short, even by the end of the process, goes on where it stopped
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, Protocol, cast

from huggingface_hub import hf_hub_download, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily

from reap_stream.checkpoint.disk import free_nbytes
from reap_stream.checkpoint.providers import Origin
from reap_stream.errors import ReadError
from reap_stream.hub.listing import RemoteFile
from reap_stream.hub.retrying import persist

LIBRARY: Final = "reap-stream"
_CHUNK_NBYTES: Final = 1 << 22


class Place(Protocol):
    """Where fetched shards lie.

    Attributes:
        evicts: `drop` deletes.
    """

    evicts: bool

    def present(self, file: RemoteFile) -> Path | None:
        """The file, if it is there whole."""
        ...

    def fetch(self, file: RemoteFile) -> Path:
        """Brings the file.

        Raises:
            ReadError: it is not what the Hub lists, or the disk is full.
            Exception: whatever huggingface_hub raises.
        """
        ...

    def drop(self, file: RemoteFile) -> None:
        """Deletes the file if it may be."""
        ...

    def stop(self) -> None:
        """Breaks off what is being brought, as far as that can be done."""
        ...


class CachePlace:
    """The Hub's cache: nothing in it is ever deleted.

    Args:
        origin: the repository.
        snapshot: the cache's folder of the commit.
    """

    evicts = False

    def __init__(self, origin: Origin, snapshot: Path) -> None:
        self._origin = origin
        self._snapshot = snapshot

    def present(self, file: RemoteFile) -> Path | None:
        """The file in the snapshot.

        Raises:
            ReadError: it has another length than the Hub lists.
        """
        path = self._snapshot / file.name
        if not path.exists():
            return None
        nbytes = path.stat().st_size
        if nbytes != file.nbytes:
            raise ReadError(
                f"{path}: {nbytes} bytes, {self._origin} lists {file.nbytes}: the cache's copy is"
                " damaged; delete it, the next run fetches it again"
            )
        return path

    def fetch(self, file: RemoteFile) -> Path:
        """Downloads into the cache."""
        _check_room(self._snapshot, file.name, file.nbytes)
        return self.fetch_checked(file)

    def fetch_checked(self, file: RemoteFile) -> Path:
        """Downloads, or finds, and a second time where the hash is wrong."""
        path = persist(lambda: self.download(file))
        if not _is_right(path, file):
            path = persist(lambda: self.download(file, anew=True))
            _check_hash(path, file, self._origin)
        return path

    def download(self, file: RemoteFile, *, anew: bool = False, local: bool = False) -> Path:
        """Gives the library's path of a file; with `local` the Hub is not asked for it."""
        return Path(
            hf_hub_download(
                self._origin.repository,
                file.name,
                revision=self._origin.revision,
                library_name=LIBRARY,
                force_download=anew,
                local_files_only=local,
            )
        )

    def drop(self, file: RemoteFile) -> None:
        """The cache is the user's."""

    def stop(self) -> None:
        """The library's downloads end with the process."""


class WorkPlace:
    """A directory of this package's own; what the cache holds is used from there.

    Args:
        origin: the repository.
        directory: where shards lie; a file bears its name only when it is whole and checked.
        cache: what is there already.
        blobs: the cache's files by hash.
    """

    evicts = True

    def __init__(self, origin: Origin, directory: Path, cache: CachePlace, blobs: Path) -> None:
        self._origin = origin
        self._directory = directory
        self._cache = cache
        self._blobs = blobs
        self._stopped = False

    def present(self, file: RemoteFile) -> Path | None:
        """The file in the cache, at whatever commit it came there, or in the directory."""
        cached = self._cache.present(file)
        if cached is not None:
            return cached
        for path in (self._blobs / file.identity, self._directory / file.name):
            if file.identity and path.is_file() and path.stat().st_size == file.nbytes:
                return path
        return None

    def fetch(self, file: RemoteFile) -> Path:
        """Downloads into the directory, on from where an earlier attempt stopped."""
        path = self._directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        there = partial.stat().st_size if partial.exists() else 0
        _check_room(path.parent, file.name, file.nbytes - there)
        self._complete(partial, file)
        if not _is_right(partial, file):
            # Perhaps what an earlier process left was not whole on the disk.
            partial.unlink()
            self._complete(partial, file)
            _check_hash(partial, file, self._origin)
        return partial.rename(path)

    def _complete(self, partial: Path, file: RemoteFile) -> None:
        def attempt() -> None:
            with partial.open("ab") as stream:
                if stream.tell() > file.nbytes:
                    stream.truncate(0)
                    stream.seek(0)
                _get(_Stoppable(stream, lambda: self._stopped), file, self._origin)

        def progress() -> int:
            return partial.stat().st_size if partial.exists() else 0

        persist(attempt, progress)

    def drop(self, file: RemoteFile) -> None:
        """Deletes the directory's copy."""
        (self._directory / file.name).unlink(missing_ok=True)

    def stop(self) -> None:
        """Lets transfers fail at their next bytes; what came stays."""
        # No lock: a signal handler may be here twice.
        self._stopped = True


class _Stoppable:
    """A file that takes no more bytes once it is told to stop."""

    def __init__(self, stream: BinaryIO, stopped: Callable[[], bool]) -> None:
        self._stream = stream
        self._stopped = stopped
        self.tell = stream.tell
        self.seek = stream.seek
        self.truncate = stream.truncate

    def write(self, data: bytes) -> int:
        if self._stopped():
            raise ReadError("the transfer was broken off, since the command ended")
        return self._stream.write(data)


def fetch_small(origin: Origin, file: RemoteFile, *, offline: bool) -> Path:
    """A small file in the Hub's cache, fetched if need be.

    Raises:
        ReadError: it is not what the Hub lists.
        Exception: whatever huggingface_hub raises.
    """
    cache = CachePlace(origin, Path())
    if offline:
        return cache.download(file, local=True)
    return cache.fetch_checked(file)


def _get(stream: _Stoppable, file: RemoteFile, origin: Origin) -> None:
    # By this name and not as Xet chunks, which would begin anew after every interruption.
    http_get(
        hf_hub_url(origin.repository, file.name, revision=origin.revision),
        cast("BinaryIO", stream),
        resume_size=stream.tell(),
        headers={**build_hf_headers(library_name=LIBRARY), "Accept-Encoding": "identity"},
        expected_size=file.nbytes,
        displayed_filename=file.name,
    )


def _check_room(directory: Path, name: str, nbytes: int) -> None:
    free = free_nbytes(directory)
    if free < nbytes:
        raise ReadError(
            f"{directory}: the disk has {free} bytes free, {name} needs {nbytes}; make room, then"
            " try again"
        )


def _check_hash(path: Path, file: RemoteFile, origin: Origin) -> None:
    if not _is_right(path, file):
        raise ReadError(
            f"{origin}: {file.name}: what was fetched, twice, is not what the Hub lists"
            f" ({path.stat().st_size} bytes, {file.nbytes} listed, hash {file.identity}): a proxy or"
            " mirror alters it, or the disk is failing"
        )


def _is_right(path: Path, file: RemoteFile) -> bool:
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
