"""A model on the Hub behind a directory, for the length of a command."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from huggingface_hub import constants, hf_hub_download

from reap_stream.checkpoint.configedit import SIDE_FILES_NAMING_MODULES
from reap_stream.checkpoint.disk import free_nbytes
from reap_stream.checkpoint.index import INDEX_NAME, read_index, shard_names
from reap_stream.checkpoint.providers import provided
from reap_stream.checkpoint.side_files import sort_names
from reap_stream.checkpoint.source import CONFIG_NAME
from reap_stream.errors import CheckpointError
from reap_stream.hub.errors import explained
from reap_stream.hub.fetching import LIBRARY
from reap_stream.hub.interrupts import stopped_by_interrupts
from reap_stream.hub.listing import Listing, list_model
from reap_stream.hub.provider import HubProvider
from reap_stream.hub.transfer import CachePlace, WorkPlace, fetch_small, has_xet, too_large
from reap_stream.hub.work_directory import check_work_directory, work_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reap_stream.hub.names import HubName

_AT_A_TIME: Final = 8


class Need(Enum):
    """What a command wants of a model.

    HEADERS: config, index and headers; SIDE_FILES: all but weights as well, shards on demand.
    """

    HEADERS = "headers"
    SIDE_FILES = "side files"


@contextmanager
def opened_hub_model(
    name: HubName, need: Need, *, work: Path | None = None, code: bool = False
) -> Iterator[Path]:
    """Puts a model behind a directory; its shards come when they are read.

    Args:
        name: the model; without a revision the main branch as it is now.
        need: which files must be there at once.
        work: where shards go that are deleted after use; None: the Hub's cache, for good.
        code: the model's own code is wanted too.

    Yields:
        The directory: the commit's snapshot in the Hub's cache.

    Raises:
        CheckpointError: the model cannot be had.
        UsageError: another process uses the work directory, or it is not this package's.
    """
    if work is not None:
        check_work_directory(work)
    listing = list_model(name)
    snapshot = _fetch_config(listing)
    _note_branch(name, listing)
    _fetch_beside(listing, need, code=code)
    cache = CachePlace(listing.origin, snapshot)
    if work is None or listing.offline:
        with _behind(HubProvider(listing, snapshot, cache)) as provider:
            if need is Need.SIDE_FILES and not listing.offline:
                _check_cache(provider, listing)
            yield snapshot
        return
    with work_directory(work, listing.origin.revision) as own:
        place = WorkPlace(listing.origin, own, cache, snapshot.parent.parent / "blobs")
        with _behind(HubProvider(listing, snapshot, place)):
            yield snapshot


@contextmanager
def _behind(provider: HubProvider) -> Iterator[HubProvider]:
    with provided(provider):
        try:
            with stopped_by_interrupts(provider):
                yield provider
        finally:
            provider.close()


def _check_cache(provider: HubProvider, listing: Listing) -> None:
    """Refuse a model that the cache's disk has no room for, or the library no way to bring there."""
    directory = provider.directory
    names = shard_names(directory, read_index(directory))
    missing = {name: provider.remote_nbytes(name) for name in names}
    for name, nbytes in missing.items():
        if nbytes > constants.MAX_HTTP_DOWNLOAD_SIZE and not has_xet():
            raise CheckpointError(too_large(listing.files[name], listing.origin))
    needed = sum(missing.values())
    free = free_nbytes(directory)
    if free < needed:
        raise CheckpointError(
            f"{provider.origin}: {needed} bytes are to be fetched, the disk of the Hub's cache"
            f" ({constants.HF_HUB_CACHE}) has {free} free: make room, set HF_HOME to a larger disk,"
            " or give --evict"
        )


def _fetch_config(listing: Listing) -> Path:
    """Fetch config.json, which tells the snapshot's folder."""
    if CONFIG_NAME not in listing.files:
        raise CheckpointError(
            f"{listing.origin}: has no {CONFIG_NAME}; a repository of GGUF files or of an adapter"
            " is no checkpoint: give the model it was made of"
        )
    return _fetch(listing, CONFIG_NAME).parent


def _note_branch(name: HubName, listing: Listing) -> None:
    """Let the library note which commit a branch is at, by which it is found offline."""
    if listing.offline or name.revision == listing.origin.revision:
        return
    with explained(name.repository, f"fetching {CONFIG_NAME}"):
        hf_hub_download(name.repository, CONFIG_NAME, revision=name.revision, library_name=LIBRARY)


def _fetch_beside(listing: Listing, need: Need, *, code: bool) -> None:
    side_files, _ = sort_names(listing.files, frozenset({CONFIG_NAME}))
    wanted = [
        name
        for name in side_files
        if need is Need.SIDE_FILES
        or name in SIDE_FILES_NAMING_MODULES
        or (code and name.endswith(".py"))
    ]
    if INDEX_NAME in listing.files:
        wanted.append(INDEX_NAME)
    with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="reap-side-files") as pool:
        list(pool.map(lambda name: _fetch(listing, name), wanted))


def _fetch(listing: Listing, name: str) -> Path:
    with explained(listing.origin.repository, f"fetching {name}"):
        return fetch_small(listing.origin, listing.files[name], offline=listing.offline)
