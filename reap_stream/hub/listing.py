"""The files of a repository at one commit, as the Hub lists them or as the cache holds them.

Sizes and hashes of this listing are what everything fetched is held to.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, constants, try_to_load_from_cache

from reap_stream.checkpoint.fingerprint import digest_sample
from reap_stream.checkpoint.providers import Origin
from reap_stream.checkpoint.source import CONFIG_NAME
from reap_stream.checkpoint.strict_json import shown
from reap_stream.errors import CheckpointError
from reap_stream.hub.errors import explained
from reap_stream.hub.names import HubName
from reap_stream.hub.retrying import persist

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_HASH: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SAMPLED: Final = "sample:"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: relative path with forward slashes.
        nbytes: its length.
        identity: hash of its content: SHA-256 of large files (LFS), git's own of others. Offline,
            in a cache without links, ``sample:`` and a hash of blocks, as directories have them.
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
        CheckpointError: there is none, access must be asked for, the Hub cannot be reached or says
            what cannot be, or, in offline mode, the cache does not hold it.
    """
    offline = constants.HF_HUB_OFFLINE
    try:
        return _list_cache(name) if offline else _list_hub(name)
    except CheckpointError as error:
        # A path that is misspelt comes here too.
        asked = "looked into the Hub's cache" if offline else "asked the Hub"
        raise CheckpointError(f"there is no path {name} here; {asked}: {error}") from error


def _list_hub(name: HubName) -> Listing:
    """What the Hub says; nothing of it is taken for a path or a hash that does not look like one."""
    with explained(name.repository, "looking it up"):
        info = persist(
            lambda: HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)
        )
    if info.sha is None or _COMMIT.fullmatch(info.sha) is None:
        raise CheckpointError(_no_hub(name, f"tells no commit but {shown(info.sha)}"))
    files = {
        sibling.rfilename: _checked(
            RemoteFile(
                sibling.rfilename,
                -1 if sibling.size is None else sibling.size,
                (sibling.lfs.sha256 if sibling.lfs else sibling.blob_id) or "",
            ),
            name,
        )
        for sibling in info.siblings or []
    }
    return Listing(Origin(info.id, info.sha), dict(sorted(files.items())))


def _checked(file: RemoteFile, name: HubName) -> RemoteFile:
    """A file as listed, whose name and hash become parts of paths."""
    parts = file.name.split("/")
    if not all(parts) or not {".", ".."}.isdisjoint(parts) or "\0" in file.name:
        raise CheckpointError(
            _no_hub(name, f"lists {shown(file.name)}, which is no path inside the repository")
        )
    if file.nbytes < 0 or _HASH.fullmatch(file.identity) is None:
        raise CheckpointError(
            _no_hub(name, f"lists no length and hash of {shown(file.name)} that could be true")
        )
    return file


def _no_hub(name: HubName, what: str) -> str:
    return f"{name}: {constants.ENDPOINT} {what}; is HF_ENDPOINT a Hub?"


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
                path.relative_to(snapshot).as_posix(), path.stat().st_size, _cached_identity(path)
            )
            for path in sorted(snapshot.rglob("*"))
            if path.is_file()
        )
    }
    return Listing(Origin(name.repository, snapshot.name), files, offline=True)


def _cached_identity(path: Path) -> str:
    """The hash that a cached file is called by, or, in a cache without links, one of a sample."""
    blob = path.resolve()
    if _HASH.fullmatch(blob.name):
        return blob.name
    digest = hashlib.sha256()
    digest_sample(digest, blob, 0, blob.stat().st_size)
    return f"{_SAMPLED}{digest.hexdigest()}"
