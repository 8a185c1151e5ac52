"""The repository's listing, read back after an upload, against the files that were sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from huggingface_hub import HfApi

from reap_stream.errors import OutputError
from reap_stream.hub.retrying import persist
from reap_stream.upload.checksums import hash_files
from reap_stream.upload.errors import explained
from reap_stream.upload.files import LocalFile
from reap_stream.upload.rights import Target, deletion, other_weights

# Made by the Hub with every repository.
_HUBS_OWN: Final = frozenset({".gitattributes"})
_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class Remote:
    """A file as the Hub lists it.

    Attributes:
        nbytes: its length.
        sha256: hash of its bytes, of large files.
        blob: git's hash, of others.
    """

    nbytes: int | None
    sha256: str | None
    blob: str | None


@dataclass(frozen=True, slots=True)
class Readback:
    """A repository that holds what was sent.

    Attributes:
        commit: the commit at which it does.
        others: files in it that were not sent now.
    """

    commit: str
    others: tuple[str, ...]


def read_back(
    api: HfApi, target: Target, files: Sequence[LocalFile], hashes: Mapping[str, str]
) -> Readback:
    """Compare names, lengths and hashes.

    Args:
        api: the Hub.
        target: the repository.
        files: what was sent.
        hashes: their SHA-256 by name.

    Raises:
        OutputError: the listing cannot be had, something else is there than was sent, or other
            weights as well.
    """
    with explained(target.repository, "reading the listing back", OutputError):
        info = persist(
            lambda: api.model_info(target.repository, revision=target.revision, files_metadata=True)
        )
    listed = {
        sibling.rfilename: Remote(
            sibling.size,
            sibling.lfs.sha256 if sibling.lfs else None,
            None if sibling.lfs else sibling.blob_id,
        )
        for sibling in info.siblings or ()
    }
    faults = list(_faults(listed, files, hashes))
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults[:_SHOWN])
        raise OutputError(
            f"{target.repository}: {len(faults)} files are not there as they were sent; run the same"
            f" command again{lines}"
        )
    sent = {file.name for file in files}
    weights = other_weights(sent, listed)
    if weights:
        raise OutputError(
            f"{target.repository}: all files are there, and {len(weights)} of other weights that"
            f" somebody else put there meanwhile: delete them: {deletion(target, weights)}"
        )
    others = tuple(sorted(listed.keys() - sent - _HUBS_OWN))
    return Readback(info.sha or "", others)


def _faults(
    listed: Mapping[str, Remote], files: Sequence[LocalFile], hashes: Mapping[str, str]
) -> Iterator[str]:
    for file in files:
        remote = listed.get(file.name)
        if remote is None:
            yield f"{file.name}: missing"
        elif remote.nbytes != file.nbytes:
            yield f"{file.name}: {remote.nbytes} bytes there, {file.nbytes} here"
        elif not _is_same(remote, file, hashes[file.name]):
            yield f"{file.name}: hash {remote.sha256 or remote.blob} there is of other bytes"


def _is_same(remote: Remote, file: LocalFile, sha256: str) -> bool:
    if remote.sha256 is not None:
        return remote.sha256 == sha256
    data = file.path.read_bytes()
    digest = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    # Between hashing and sending the file may have been changed.
    return remote.blob == digest.hexdigest() and hash_files([file])[file.name] == sha256
