"""A source checkpoint: a directory of config, safetensors shards and side files, checked as one.

Opening reads headers and JSON only, never a tensor. What comes back is consistent: every tensor
lies in exactly one shard, index and shards agree, every shard has the length its header says, and
no file was reached through a link out of the checkpoint. A truncated download or a tampered index
is found here, in the first second, not after hours of calibration.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from reap_stream.checkpoint.files import check_contained, read_small
from reap_stream.checkpoint.header import Header, parse_header, read_header_bytes
from reap_stream.checkpoint.index import (
    INDEX_NAME,
    PICKLED_SUFFIXES,
    check_against_index,
    read_index,
    shard_names,
)
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.checkpoint.side_files import list_side_files
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object, shown
from reap_stream.errors import CheckpointError

CONFIG_NAME: Final = "config.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint with its weights, as `open_checkpoint` found it.

    Attributes:
        directory: where it lies, as given.
        config: parsed config.json.
        config_text: config.json as it stands in the file.
        tensors: every tensor by name, in the order of shards and of offsets within a shard.
        shards: the weight files, sorted by name; paths as in the directory, links not resolved.
        index_metadata: the index's ``metadata`` object; empty without an index.
        metadata: safetensors metadata of the first shard, e.g. ``{"format": "pt"}``.
        side_files: relative paths of the files that go along to a pruned checkpoint.
        skipped_files: relative paths of the files that do not: weights in other formats, shards
            that the index does not name. A folder skipped whole ends in a slash.
        fingerprint: hex SHA-256 over the text of config.json and, for each shard, its name, its
            length and its raw header. It changes with any tensor's name, dtype, shape or place,
            and costs no more than the headers. Tensor bytes are not hashed, so weights changed
            in place keep it; times of modification do not enter, so a copy keeps it too.
    """

    directory: Path
    config: dict[str, Any]
    config_text: str
    tensors: dict[str, TensorRef]
    shards: tuple[Path, ...]
    index_metadata: dict[str, Any]
    metadata: dict[str, str]
    side_files: tuple[str, ...]
    skipped_files: tuple[str, ...]
    fingerprint: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, headers not counted."""
        return sum(ref.nbytes for ref in self.tensors.values())


@dataclass(frozen=True, slots=True)
class ConfigOnly:
    """What a directory says without its weights, enough to inspect and plan.

    Attributes:
        directory: where it lies, as given.
        config: parsed config.json.
        config_text: config.json as it stands in the file.
        weight_map: tensor name to shard of the index; None without an index.
        total_size: bytes of all tensors as the index claims (its ``total_size``), unchecked;
            None where it says nothing usable.
    """

    directory: Path
    config: dict[str, Any]
    config_text: str
    weight_map: dict[str, str] | None
    total_size: int | None


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read and check everything about a checkpoint except its tensors' bytes.

    Args:
        directory: holds config.json and safetensors shards: with an index, as one
            ``model.safetensors``, or as a complete numbered series. A snapshot of a Hub cache is
            such a directory.

    Raises:
        CheckpointError: anything missing, damaged, contradictory or unsafe; the message names
            the file and says what to do.
    """
    config, config_text = _read_config(directory)
    index = read_index(directory)
    names = shard_names(directory, index)
    if not names:
        raise _no_weights(directory)
    digest = hashlib.sha256()
    _digest(digest, config_text.encode("utf-8"))
    found: dict[str, str] = {}
    tensors: dict[str, TensorRef] = {}
    metadata: dict[str, str] = {}
    for position, name in enumerate(names):
        header = _read_shard(directory, name, digest)
        _add_tensors(header, name, found, directory)
        tensors.update(header.tensors)
        if position == 0:
            metadata = header.metadata
    if index is not None:
        check_against_index(index, found, directory)
    if not tensors:
        raise CheckpointError(f"{directory}: {len(names)} shards, none of which holds a tensor")
    known = frozenset({CONFIG_NAME, INDEX_NAME, *names})
    side_files, skipped_files = list_side_files(directory, known)
    return Checkpoint(
        directory=directory,
        config=config,
        config_text=config_text,
        tensors=tensors,
        shards=tuple(directory / name for name in names),
        index_metadata={} if index is None else index.metadata,
        metadata=metadata,
        side_files=side_files,
        skipped_files=skipped_files,
        fingerprint=digest.hexdigest(),
    )


def open_config(directory: Path) -> ConfigOnly:
    """Read config.json and, where present, the index; shards need not exist.

    Raises:
        CheckpointError: no directory, no config.json, or either file is not what it must be.
    """
    config, config_text = _read_config(directory)
    index = read_index(directory)
    return ConfigOnly(
        directory=directory,
        config=config,
        config_text=config_text,
        weight_map=None if index is None else index.weight_map,
        total_size=None if index is None else _claimed_nbytes(index.metadata.get("total_size")),
    )


def has_weights(directory: Path) -> bool:
    """Tell whether any safetensors shard of the checkpoint is there.

    True even where others are missing or a link leads to nothing, so that an incomplete download is opened as a checkpoint,
    and refused, rather than taken for a directory that was never meant to have weights.

    Raises:
        CheckpointError: no such directory, or the index or the shards' names are malformed.
    """
    _check_directory(directory)
    names = shard_names(directory, read_index(directory))
    return any(os.path.lexists(directory / name) for name in names)


def _check_directory(directory: Path) -> None:
    try:
        mode = directory.stat().st_mode
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: no such directory: {error}") from error
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{directory}: a file; give the directory that holds {CONFIG_NAME}")


def _read_config(directory: Path) -> tuple[dict[str, Any], str]:
    _check_directory(directory)
    path = directory / CONFIG_NAME
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: missing; a checkpoint directory has one")
    check_contained(path, directory)
    raw = read_small(path, MAX_JSON_NBYTES)
    return parse_object(raw, path, finite=False), raw.decode("utf-8")


def _read_shard(directory: Path, name: str, digest: hashlib._Hash) -> Header:
    path = directory / name
    check_contained(path, directory)
    raw, file_nbytes = read_header_bytes(path)
    _digest(digest, name.encode("utf-8"))
    _digest(digest, str(file_nbytes).encode("ascii"))
    _digest(digest, raw)
    return parse_header(raw, path, file_nbytes)


def _digest(digest: hashlib._Hash, part: bytes) -> None:
    # The length first, so that no two lists of parts give the same stream.
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _add_tensors(header: Header, shard: str, found: dict[str, str], directory: Path) -> None:
    for tensor in header.tensors:
        if tensor in found:
            raise CheckpointError(
                f"{directory}: tensor {shown(tensor)} is in {found[tensor]} and in {shard};"
                " remove the shard that does not belong"
            )
        found[tensor] = shard


def _no_weights(directory: Path) -> CheckpointError:
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLED_SUFFIXES)
    if pickled:
        return CheckpointError(
            f"{directory}: only pickled weights ({shown(pickled)}), and reading those would run"
            " code from the file; convert them to safetensors first"
        )
    return CheckpointError(
        f"{directory}: no weights: neither {INDEX_NAME}, nor model.safetensors, nor numbered shards"
    )


def _claimed_nbytes(value: object) -> int | None:
    # Some writers put a float there.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and value >= 0 else None
