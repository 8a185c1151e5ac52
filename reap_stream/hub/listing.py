"""The files of a repository at one commit, as the Hub lists them or as the cache holds them.

Sizes and hashes of this listing are what everything fetched is held to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, constants, try_to_load_from_cache

from reap_stream.checkpoint.providers import Origin
from reap_stream.checkpoint.source import CONFIG_NAME
from reap_stream.errors import CheckpointError
from reap_stream.hub.errors import explained
from reap_stream.hub.names import HubName

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: relative path with forward slashes.
        nbytes: its length.
        identity: hash of its content: SHA-256 of large files (LFS), git's own of others; empty
            where a cache without links does not tell.
    """

    name: str
    nbytes: int
    identity: str

    @property
    def sha256(self) -> str | None:
        """The hash of its bytes, where the Hub gives that one."""
        return self.identity if _SHA256.fullmatch(self.identity) else None


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit.

    Attributes:
        origin: id and commit.
        files: by name, sorted.
        offline: the cache's snapshot: nothing can be fetched.
    """

    origin: Origin
    files: dict[str, RemoteFile]
    offline: bool = False


def list_model(name: HubName) -> Listing:
    """Find a model and pin its revision.

    Raises:
        CheckpointError: there is none, access must be asked for, the Hub cannot be reached, or, in
            offline mode, the cache does not hold it.
    """
    if constants.HF_HUB_OFFLINE:
        return _list_cache(name)
    with explained(name.repository, "looking it up"):
        info = HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)
    siblings = info.siblings or []
    if info.sha is None or any(sibling.size is None for sibling in siblings):
        raise CheckpointError(
            f"{name}: {constants.ENDPOINT} tells no commit or no sizes of files; is HF_ENDPOINT a"
            " Hub?"
        )
    files = {
        sibling.rfilename: RemoteFile(
            sibling.rfilename,
            sibling.size or 0,
            sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or "",
        )
        for sibling in siblings
    }
    return Listing(Origin(info.id, info.sha), dict(sorted(files.items())))


def _list_cache(name: HubName) -> Listing:
    """The snapshot that the cache has of a revision."""
    found = try_to_load_from_cache(name.repository, CONFIG_NAME, revision=name.revision)
    if not isinstance(found, str):
        raise CheckpointError(
            f"{name}: offline mode is on (HF_HUB_OFFLINE) and the cache {constants.HF_HUB_CACHE}"
            " does not hold it: unset it, or fetch the model where there is a network"
        )
    snapshot = Path(found).parent
    files = {
        file.name: file
        for file in (
            RemoteFile(
                path.relative_to(snapshot).as_posix(), path.stat().st_size, path.resolve().name
            )
            for path in sorted(snapshot.rglob("*"))
            if path.is_file()
        )
    }
    return Listing(Origin(name.repository, snapshot.name), files, offline=True)
