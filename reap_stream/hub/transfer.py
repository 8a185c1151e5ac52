"""One file of a repository onto the disk, held to the size and the hash that the Hub lists.

into the Hub's cache    `hf_hub_download`, as every program that shares the cache does it; what
                        is in the cache already is taken as it is, its length checked
into a work directory   for shards that are deleted once they are used. A transfer that was cut
                        short, even by the end of the process, goes on where it stopped
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from huggingface_hub import constants, hf_hub_download

from reap_stream.checkpoint.providers import Origin
from reap_stream.errors import ReadError
from reap_stream.hub.checks import check_hash, check_room, is_right
from reap_stream.hub.fetching import LIBRARY, complete
from reap_stream.hub.listing import RemoteFile
from reap_stream.hub.retrying import persist


class Place(Protocol):
    """Where fetched shards lie.

    Attributes:
        evicts: `drop` deletes.
    """

    evicts: bool

    @property
    def directory(self) -> Path:
        """The folder that they lie in."""
        ...

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

    def missing_nbytes(self, file: RemoteFile) -> int:
        """Bytes that are still to come onto the disk."""
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

    @property
    def directory(self) -> Path:
        """The snapshot."""
        return self._snapshot

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
        check_room(self._snapshot, file.name, file.nbytes)
        try:
            return self.fetch_checked(file)
        except ValueError as error:
            if file.nbytes <= constants.MAX_HTTP_DOWNLOAD_SIZE:
                raise
            raise ReadError(too_large(file, self._origin)) from error

    def fetch_checked(self, file: RemoteFile) -> Path:
        """Downloads, or finds, and a second time where the hash is wrong."""
        path = persist(lambda: self.download(file))
        if not is_right(path, file):
            path = persist(lambda: self.download(file, anew=True))
            check_hash(path, file, self._origin)
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

    def missing_nbytes(self, file: RemoteFile) -> int:
        """All of it, as long as it is not there whole."""
        return 0 if self.present(file) is not None else file.nbytes

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
        # Of what an earlier process left, however whole, it is not known what reached the disk.
        self._checked: set[str] = set()

    @property
    def directory(self) -> Path:
        """The work directory's folder of the commit."""
        return self._directory

    def present(self, file: RemoteFile) -> Path | None:
        """The file in the cache, at whatever commit it came there, or in the directory."""
        cached = self._cache.present(file)
        if cached is not None:
            return cached
        blob = self._blobs / file.identity
        if file.identity and blob.is_file() and blob.stat().st_size == file.nbytes:
            return blob
        return self._directory / file.name if file.name in self._checked else None

    def missing_nbytes(self, file: RemoteFile) -> int:
        """What neither the cache nor the directory has."""
        if self.present(file) is not None:
            return 0
        path = self._directory / file.name
        there = (p.stat().st_size for p in (path, _partial(path)) if p.exists())
        return max(0, file.nbytes - max(there, default=0))

    def fetch(self, file: RemoteFile) -> Path:
        """Downloads into the directory, on from where an earlier attempt stopped."""
        path = self._directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        if path.exists():
            path.rename(partial)
        check_room(path.parent, file.name, self.missing_nbytes(file))
        self._complete(partial, file)
        if not is_right(partial, file):
            # Perhaps what an earlier process left was not whole on the disk.
            partial.unlink()
            self._complete(partial, file)
            check_hash(partial, file, self._origin)
        partial.rename(path)
        self._checked.add(file.name)
        return path

    def _complete(self, partial: Path, file: RemoteFile) -> None:
        complete(partial, file, self._origin, lambda: self._stopped)

    def drop(self, file: RemoteFile) -> None:
        """Deletes the directory's copy."""
        self._checked.discard(file.name)
        (self._directory / file.name).unlink(missing_ok=True)

    def stop(self) -> None:
        """Lets transfers fail at their next bytes; what came stays."""
        # No lock: a signal handler may be here twice.
        self._stopped = True


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


def has_xet() -> bool:
    """Whether the library can fetch files in chunks of its other protocol."""
    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def too_large(file: RemoteFile, origin: Origin) -> str:
    """Why a file cannot be fetched into the cache."""
    return (
        f"{origin}: {file.name} has {file.nbytes} bytes, and huggingface_hub puts files of more than"
        f" {constants.MAX_HTTP_DOWNLOAD_SIZE} into its cache by hf_xet alone: install hf_xet where"
        " the Hub stores the model by it, or give --evict, which fetches such files in parts"
    )


def _partial(path: Path) -> Path:
    """What there is of a file that is not whole, or not known to be."""
    return path.with_name(f"{path.name}.partial")
