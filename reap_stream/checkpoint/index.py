"""Which shards make up a checkpoint: what the index says, or what the file names say without one.

The index maps tensor names to file names, and both come from a stranger: a file name in it is
a path that would be opened, so it is held to plain relative paths before any use.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from reap_stream.checkpoint.files import check_contained, read_small
from reap_stream.checkpoint.providers import provider_of
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object, shown
from reap_stream.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
PICKLED_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Both `model-00001-of-00092.safetensors` and `model.safetensors-00001-of-00092.safetensors` occur.
_NUMBERED: Final = re.compile(r"(model.*?)-(\d+)-of-(\d+)\.safetensors", re.ASCII)


@dataclass(frozen=True, slots=True)
class Index:
    """A checked ``model.safetensors.index.json``.

    Attributes:
        weight_map: tensor name to shard, a relative path with forward slashes.
        metadata: the index's own ``metadata`` object, e.g. ``{"total_size": 716000000000}``.
    """

    weight_map: dict[str, str]
    metadata: dict[str, Any]


def read_index(directory: Path) -> Index | None:
    """Read and check the index; None where the directory has none.

    Raises:
        CheckpointError: not the JSON it must be, or a shard named in it is not a relative path
            to a ``.safetensors`` file inside the directory.
    """
    path = directory / INDEX_NAME
    if not os.path.lexists(path):
        return None
    check_contained(path, directory)
    index = parse_object(read_small(path, MAX_JSON_NBYTES), path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: weight_map must map tensor names to shards, not be {shown(weight_map)}"
        )
    for tensor, shard in weight_map.items():
        _check_shard_name(shard, f"{path}: tensor {shown(tensor)}")
    metadata = index.get("metadata")
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: metadata must be an object, not {shown(metadata)}")
    return Index(weight_map, metadata)


def shard_names(directory: Path, index: Index | None) -> list[str]:
    """Return the shards' relative paths, sorted; they need not exist where an index names them.

    Without an index: ``model.safetensors``, or every file of one complete
    ``model-<i>-of-<n>.safetensors`` series; empty where there is neither.

    Raises:
        CheckpointError: no index, and the names leave open which files belong together: both
            kinds, two series, or a series with gaps.
    """
    if index is not None:
        return sorted(set(index.weight_map.values()))
    names = names_in(directory)
    series: dict[tuple[str, int], dict[str, int]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match:
            number, total = int(match[2]), int(match[3])
            series.setdefault((match[1], total), {})[name] = number
    if SINGLE_NAME in names:
        if series:
            raise CheckpointError(
                f"{directory}: holds {SINGLE_NAME} and numbered shards but no {INDEX_NAME} to"
                " choose between them; remove what does not belong"
            )
        return [SINGLE_NAME]
    if len(series) > 1:
        found = ", ".join(f"{prefix}-…-of-{total}" for prefix, total in sorted(series))
        raise CheckpointError(
            f"{directory}: holds {len(series)} series of shards ({found}) but no {INDEX_NAME};"
            " remove what does not belong"
        )
    for (_, total), numbers in series.items():
        _check_complete(numbers, total, directory)
    return sorted(name for numbers in series.values() for name in numbers)


def check_against_index(index: Index, found: dict[str, str], directory: Path) -> None:
    """Refuse an index and shards that disagree about any tensor.

    Args:
        index: what the index says.
        found: for each tensor in a shard's header, that shard's relative path.
        directory: the checkpoint, for messages.

    Raises:
        CheckpointError: a tensor that only one of the two has, or that they put in different
            shards.
    """
    path = directory / INDEX_NAME
    for tensor, shard in found.items():
        listed = index.weight_map.get(tensor)
        if listed is None:
            raise CheckpointError(
                f"{path}: does not list tensor {shown(tensor)}, which is in {shard}; rebuild the"
                " index or fetch the checkpoint again"
            )
        if listed != shard:
            raise CheckpointError(
                f"{path}: lists tensor {shown(tensor)} in {listed}, it is in {shard}; rebuild the"
                " index or fetch the checkpoint again"
            )
    missing = index.weight_map.keys() - found.keys()
    if missing:
        tensor = min(missing)
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(index.weight_map)} tensors it lists are absent, first"
            f" {shown(tensor)}, which {index.weight_map[tensor]} does not hold; fetch it again"
        )


def names_in(directory: Path) -> list[str]:
    """The directory's entries, or the files that its provider has at its top."""
    provider = provider_of(directory)
    if provider is not None:
        return sorted(name for name in provider.names if "/" not in name)
    try:
        return sorted(path.name for path in directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed: {error}") from error


def _check_shard_name(name: Any, where: str) -> None:
    if not isinstance(name, str):
        raise CheckpointError(f"{where}: its shard must be a file name, not {shown(name)}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise CheckpointError(f"{where}: shard {shown(name)} is not inside the checkpoint")
    if path.suffix != ".safetensors" or not name.isprintable():
        raise CheckpointError(f"{where}: shard {shown(name)} is not a .safetensors file name")


def _check_complete(numbers: dict[str, int], total: int, directory: Path) -> None:
    present = set(numbers.values())
    # Bounded by the files found: `total` is only a number in a file name.
    missing = next(i for i in range(1, len(numbers) + 2) if i not in present)
    if missing <= total:
        raise CheckpointError(
            f"{directory}: {len(numbers)} of {total} shards, number {missing} is missing; fetch the"
            " checkpoint again"
        )
    if len(numbers) != total:
        raise CheckpointError(
            f"{directory}: {len(numbers)} shards for {total} numbers: {shown(sorted(numbers))};"
            " remove what does not belong"
        )
