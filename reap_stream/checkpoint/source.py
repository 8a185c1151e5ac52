"""A source checkpoint: a directory of config, safetensors shards and side files, checked as one.

Opening reads headers, JSON and a sample of each shard. What comes back is consistent: every tensor
lies in exactly one shard, index and shards agree, every shard has the length its header says, and
no file was reached through a link out of the checkpoint. A truncated download or a tampered index
is found here, in the first second, not after hours of calibration.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from reap_stream.checkpoint.files import check_contained, read_small
from reap_stream.checkpoint.fingerprint import digest_part, digest_sample, digest_start
from reap_stream.checkpoint.header import Header, parse_header, read_header_bytes
from reap_stream.checkpoint.index import (
    INDEX_NAME,
    PICKLED_SUFFIXES,
    check_against_index,
    names_in,
    read_index,
    shard_names,
)
from reap_stream.checkpoint.providers import Origin, ShardProvider, provider_of
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.checkpoint.side_files import list_side_files
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object, shown
from reap_stream.errors import CheckpointError

CONFIG_NAME: Final = "config.json"

# Keys whose values the package reads as such; null stands for absent.
_CONFIG_TYPES: Final = (("model_type", str, "a string"), ("text_config", dict, "an object"))


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
            length, its raw header and a sample of its data: 256 blocks of 4 KiB, evenly spaced,
            or all of it where it is no longer than these. It tells models of one architecture
            apart, trained or fine-tuned otherwise, at the price of 1 MiB a shard; a change that
            falls between the blocks keeps it. Times of modification do not enter, so a copy
            keeps it too. Of a checkpoint on the Hub, whose bytes are not here yet, the hash of
            each shard's content stands in the sample's place.
        origin: where the checkpoint comes from, if not from a directory.
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
    origin: Origin | None = None

    @property
    def name(self) -> str:
        """What the model is called: the last part of its repository or its directory."""
        if self.origin is not None:
            return self.origin.repository.rpartition("/")[2]
        return self.directory.resolve().name

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
    """Read and check everything about a checkpoint; of its tensors' bytes, only a sample.

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
    digest_part(digest, config_text.encode("utf-8"))
    found: dict[str, str] = {}
    tensors: dict[str, TensorRef] = {}
    metadata: dict[str, str] = {}
    provider = provider_of(directory)
    headers = _local_headers if provider is None else partial(_provided_headers, provider)
    for position, (name, header) in enumerate(headers(directory, names, digest)):
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
        origin=None if provider is None else provider.origin,
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
    provider = provider_of(directory)
    if provider is not None:
        return not set(names).isdisjoint(provider.names)
    return any(os.path.lexists(directory / name) for name in names)


def _check_directory(directory: Path) -> None:
    try:
        mode = directory.stat().st_mode
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: no such directory; give that of a checkpoint, or an id on the Hub "
            f"(org/name): {getattr(error, 'strerror', None) or error}"
        ) from error
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{directory}: a file; give the directory that holds {CONFIG_NAME}")


def _read_config(directory: Path) -> tuple[dict[str, Any], str]:
    _check_directory(directory)
    path = directory / CONFIG_NAME
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: missing; a checkpoint directory has one")
    check_contained(path, directory)
    raw = read_small(path, MAX_JSON_NBYTES)
    config = parse_object(raw, path, finite=False)
    _check_types(config, path)
    return config, raw.decode("utf-8")


def _check_types(config: dict[str, Any], path: Path) -> None:
    for key, kind, wanted in _CONFIG_TYPES:
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise CheckpointError(f"{path}: {key} is {shown(config[key])}, expected {wanted}")
    names = config.get("architectures")
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is not None and not named:
        raise CheckpointError(f"{path}: architectures is {shown(names)}, expected a list of names")


def _local_headers(
    directory: Path, names: Sequence[str], digest: hashlib._Hash
) -> Iterator[tuple[str, Header]]:
    for name in names:
        path = directory / name
        check_contained(path, directory)
        header, file_nbytes = _check_start(*read_header_bytes(path), path, name, digest)
        digest_sample(digest, path, header.data_start, file_nbytes)
        yield name, header


def _provided_headers(
    provider: ShardProvider, directory: Path, names: Sequence[str], digest: hashlib._Hash
) -> Iterator[tuple[str, Header]]:
    for name, start in zip(names, provider.read_starts(names), strict=True):
        header, _ = _check_start(start.raw, start.nbytes, directory / name, name, digest)
        digest_part(digest, start.identity.encode("ascii"))
        yield name, header


def _check_start(
    raw: bytes, file_nbytes: int, path: Path, name: str, digest: hashlib._Hash
) -> tuple[Header, int]:
    digest_start(digest, name, file_nbytes, raw)
    return parse_header(raw, path, file_nbytes), file_nbytes


def _add_tensors(header: Header, shard: str, found: dict[str, str], directory: Path) -> None:
    for tensor in header.tensors:
        if tensor in found:
            raise CheckpointError(
                f"{directory}: tensor {shown(tensor)} is in {found[tensor]} and in {shard};"
                " remove the shard that does not belong"
            )
        found[tensor] = shard


def _no_weights(directory: Path) -> CheckpointError:
    pickled = sorted(name for name in names_in(directory) if name.endswith(PICKLED_SUFFIXES))
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
