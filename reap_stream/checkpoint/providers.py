"""Shards that are not on the disk: who brings them is asked before a file is opened.

A checkpoint is a directory to this package. Where its shards come from elsewhere (the Hub), a
provider stands behind the directory while a command runs:

    with provided(provider):
        open_checkpoint(provider.directory)     headers without the shards
        Reader().read(ref)                      the shard of `ref.file` is fetched first

A tensor's `file` keeps the name it would have in the directory; `local_files` says where its bytes
really lie. Directories without a provider cost a look into an empty table.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from reap_stream.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint comes from.

    Attributes:
        repository: its id, e.g. ``org/name``.
        revision: the commit, 40 hexadecimal digits.
    """

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


@dataclass(frozen=True, slots=True)
class ShardStart:
    """What is known of a shard without its tensors' bytes.

    Attributes:
        raw: its header, length prefix included.
        nbytes: length of the file.
        identity: a hash of its content, as the provider knows it.
    """

    raw: bytes
    nbytes: int
    identity: str


class ShardProvider(Protocol):
    """Brings the shards of one directory; names are relative paths with forward slashes."""

    @property
    def directory(self) -> Path:
        """The checkpoint as the rest of the package sees it; small files lie there."""
        ...

    @property
    def origin(self) -> Origin:
        """What the directory stands for."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Every file that there is, brought or not."""
        ...

    @property
    def evicts(self) -> bool:
        """Whether shards that are let go are deleted."""
        ...

    @property
    def place(self) -> Path:
        """Where shards are brought to."""
        ...

    def read_starts(self, names: Sequence[str]) -> list[ShardStart]:
        """The headers of shards, in the order of their names.

        Raises:
            CheckpointError: one is missing or cannot be had.
        """
        ...

    def ensure(self, names: Sequence[str]) -> list[Path]:
        """Waits until shards are on the disk; where each lies.

        Raises:
            ReadError: one cannot be had.
        """
        ...

    def prefetch(self, names: Iterable[str]) -> None:
        """Begins to bring shards that will be needed soon; returns at once."""
        ...

    def release(self, names: Iterable[str]) -> None:
        """Is told that shards are not needed any more."""
        ...

    def remote_nbytes(self, name: str) -> int:
        """Bytes that bringing a file would take on the disk; 0 where it is there already."""
        ...


_PROVIDERS: dict[Path, ShardProvider] = {}


@contextmanager
def provided(provider: ShardProvider) -> Iterator[None]:
    """Puts a provider behind its directory for the length of a block.

    Raises:
        UsageError: another one stands behind it.
    """
    directory = provider.directory
    if directory in _PROVIDERS:
        message = f"{provider.origin}: is in use already: give each model once"
        raise UsageError(message)
    _PROVIDERS[directory] = provider
    try:
        yield
    finally:
        del _PROVIDERS[directory]


def provider_of(directory: Path) -> ShardProvider | None:
    """What stands behind a directory; None where it is what it seems."""
    return _PROVIDERS.get(directory) if _PROVIDERS else None


def model_name(directory: Path) -> str:
    """What a model is called in records: id and commit, or the path."""
    provider = provider_of(directory)
    return str(directory) if provider is None else str(provider.origin)


def local_files(files: Sequence[Path]) -> list[Path]:
    """Where files lie, brought now if they were elsewhere.

    Raises:
        ReadError: one cannot be had.
    """
    if not _PROVIDERS:
        return list(files)
    found = {file: file for file in files}
    for provider, own in _owned(files):
        places = provider.ensure([name for _, name in own])
        found.update(zip((file for file, _ in own), places, strict=True))
    return [found[file] for file in files]


def local_file(file: Path) -> Path:
    """As `local_files`, of one."""
    return local_files((file,))[0]


def prefetch_files(files: Iterable[Path], *, lasting: bool = False) -> None:
    """Asks for files that will be read soon; returns at once.

    Args:
        files: which.
        lasting: leave out those that would be deleted after use.
    """
    for provider, own in _owned(list(files)) if _PROVIDERS else ():
        if not (lasting and provider.evicts):
            provider.prefetch(name for _, name in own)


def release_files(files: Iterable[Path]) -> None:
    """Says that nothing will read files any more."""
    for provider, own in _owned(list(files)) if _PROVIDERS else ():
        provider.release(name for _, name in own)


def _owned(files: Sequence[Path]) -> Iterator[tuple[ShardProvider, list[tuple[Path, str]]]]:
    """Each provider with the (file, name) that are its."""
    for directory, provider in _PROVIDERS.items():
        own = [
            (file, file.relative_to(directory).as_posix())
            for file in files
            if file.is_relative_to(directory)
        ]
        if own:
            yield provider, own
