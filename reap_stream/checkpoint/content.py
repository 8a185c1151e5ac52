"""What a directory would be called if it were on the Hub: by the hashes of its files.

A checkpoint on the Hub is told from others by hashes that the repository lists, a directory by a
sample of its bytes. One cannot be had of the other, so where both must be compared the directory
is read whole.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final

from reap_stream.checkpoint.files import open_regular
from reap_stream.checkpoint.fingerprint import digest_part, digest_start
from reap_stream.checkpoint.header import read_header_bytes
from reap_stream.errors import ReadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from reap_stream.checkpoint.source import Checkpoint

_CHUNK_NBYTES: Final = 1 << 22
_AT_A_TIME: Final = 4


def content_fingerprint(checkpoint: Checkpoint, progress: Callable[[int], None]) -> str:
    """The fingerprint that a directory's files have as a model on the Hub.

    That is so of repositories that keep shards as large files (LFS or Xet), as all but the smallest
    must be.

    Args:
        checkpoint: of a directory.
        progress: is told of bytes, from several threads.

    Raises:
        ReadError: a shard cannot be read.
    """
    with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="reap-hashes") as pool:
        hashes = list(pool.map(partial(_sha256, progress), checkpoint.shards))
    digest = hashlib.sha256()
    digest_part(digest, checkpoint.config_text.encode("utf-8"))
    for shard, found in zip(checkpoint.shards, hashes, strict=True):
        raw, nbytes = read_header_bytes(shard)
        digest_start(digest, shard.relative_to(checkpoint.directory).as_posix(), nbytes, raw)
        digest_part(digest, found.encode("ascii"))
    return digest.hexdigest()


def _sha256(progress: Callable[[int], None], path: Path) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK_NBYTES)
    try:
        with open_regular(path) as (descriptor, _):
            while nbytes := os.readv(descriptor, [buffer]):
                digest.update(memoryview(buffer)[:nbytes])
                progress(nbytes)
    except OSError as error:
        raise ReadError(f"{path}: could not be read: {error}") from error
    return digest.hexdigest()
