"""What tells checkpoints apart without reading them whole: a hash over parts and samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from reap_stream.checkpoint.files import open_regular, pread_exact

if TYPE_CHECKING:
    import hashlib
    from pathlib import Path

_SAMPLE_BLOCKS: Final = 256
_SAMPLE_NBYTES: Final = 4096


def digest_part(digest: hashlib._Hash, part: bytes) -> None:
    """Adds a part to a hash."""
    # The length first, so that no two lists of parts give the same stream.
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def digest_start(digest: hashlib._Hash, name: str, nbytes: int, raw: bytes) -> None:
    """Adds what stands before a shard's data.

    Args:
        digest: the hash.
        name: of the shard.
        nbytes: length of its file.
        raw: its header, length prefix included.
    """
    digest_part(digest, name.encode("utf-8"))
    digest_part(digest, str(nbytes).encode("ascii"))
    digest_part(digest, raw)


def digest_sample(digest: hashlib._Hash, path: Path, start: int, end: int) -> None:
    """Adds evenly spaced blocks of a shard's data, the first and the last included."""
    nbytes = end - start
    if nbytes <= _SAMPLE_BLOCKS * _SAMPLE_NBYTES:
        pieces = [(start, nbytes)]
    else:
        room, steps = nbytes - _SAMPLE_NBYTES, _SAMPLE_BLOCKS - 1
        pieces = [(start + room * i // steps, _SAMPLE_NBYTES) for i in range(_SAMPLE_BLOCKS)]
    with open_regular(path) as (fd, _):
        for offset, length in pieces:
            digest_part(digest, pread_exact(fd, length, offset, path))
