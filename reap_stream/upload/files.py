"""What is sent: the files of a checkpoint, and nothing that merely lies in its directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reap_stream.checkpoint.files import check_contained
from reap_stream.checkpoint.index import INDEX_NAME
from reap_stream.checkpoint.publish import RECORDS
from reap_stream.checkpoint.source import CONFIG_NAME, Checkpoint
from reap_stream.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to send.

    Attributes:
        name: relative path with forward slashes.
        path: where it lies.
        nbytes: its length.
    """

    name: str
    path: Path
    nbytes: int


def local_files(checkpoint: Checkpoint) -> list[LocalFile]:
    """The files of a pruned checkpoint, sorted by name; hidden ones are not among them.

    Raises:
        CheckpointError: weights that are not the checkpoint's lie beside it, or a link leads out.
    """
    directory = checkpoint.directory
    strange = [name for name in checkpoint.skipped_files if not name.startswith(f"{RECORDS}/")]
    if strange:
        raise CheckpointError(
            f"{directory}: {', '.join(strange[:5])}: no part of the checkpoint; move it away, or it"
            " would be published with it"
        )
    names = {CONFIG_NAME, INDEX_NAME, *checkpoint.side_files, *checkpoint.skipped_files}
    names |= {path.relative_to(directory).as_posix() for path in checkpoint.shards}
    return [_local(directory, name) for name in sorted(names)]


def _local(directory: Path, name: str) -> LocalFile:
    path = directory / name
    check_contained(path, directory)
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, or no regular file")
    return LocalFile(name, path, path.stat().st_size)
