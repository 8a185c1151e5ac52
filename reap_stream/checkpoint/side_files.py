"""The files beside the weights: which go along to a pruned checkpoint and which stay behind.

Tokenizer, generation config, chat templates, licence, custom code: everything but the weights
goes along, whatever its name, since engines look for files this package has never heard of.
Copies of the unpruned weights in other formats stay behind: they are no part of the result.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, NoReturn

from reap_stream.checkpoint.files import check_contained
from reap_stream.checkpoint.index import INDEX_NAME, PICKLED_SUFFIXES
from reap_stream.checkpoint.providers import provider_of
from reap_stream.checkpoint.strict_json import shown
from reap_stream.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_WEIGHT_SUFFIXES: Final = (
    *PICKLED_SUFFIXES,
    ".safetensors",
    ".index.json",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".npz",
    ".nemo",
    ".tflite",
    ".mlpackage",
)
# `original` and `metal` are where the Llama and gpt-oss releases keep their vendors' own weights.
_SKIPPED_FOLDERS: Final = frozenset({"original", "metal", "__pycache__"})


def list_side_files(
    directory: Path, known: frozenset[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sort the files of a checkpoint directory into those that go along and those that do not.

    Hidden files and folders belong to git or to a download cache and are in neither list.

    Args:
        directory: the checkpoint.
        known: relative paths treated elsewhere (shards, index, config.json); in neither list.

    Returns:
        (side files, skipped files), relative paths with forward slashes, sorted. A folder skipped
        as a whole ends in a slash: vendors' copies of the weights, and links to folders.

    Raises:
        CheckpointError: a folder cannot be read, a side file's links lead out of the checkpoint,
            or its name is not UTF-8.
    """
    provider = provider_of(directory)
    if provider is not None:
        return sort_names(provider.names, known)
    side: list[str] = []
    skipped: list[str] = []
    for name, is_folder in _walk(directory):
        if name in known or name == INDEX_NAME:
            continue
        if is_folder:
            skipped.append(f"{name}/")
            continue
        if _is_weights(name):
            skipped.append(name)
            continue
        path = directory / name
        _check_name(name, directory)
        check_contained(path, directory)
        (side if path.is_file() else skipped).append(name)
    return tuple(sorted(side)), tuple(sorted(skipped))


def sort_names(
    names: Iterable[str], known: frozenset[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`list_side_files` for a listing: the files of a repository by name."""
    side: set[str] = set()
    skipped: set[str] = set()
    for name in names:
        parts = PurePosixPath(name).parts
        if name in known or name == INDEX_NAME or any(part.startswith(".") for part in parts):
            continue
        folders = [i for i, part in enumerate(parts[:-1]) if part in _SKIPPED_FOLDERS]
        if folders:
            skipped.add("/".join(parts[: folders[0] + 1]) + "/")
        else:
            (skipped if _is_weights(name) else side).add(name)
    return tuple(sorted(side)), tuple(sorted(skipped))


def _is_weights(name: str) -> bool:
    return name.lower().endswith(_WEIGHT_SUFFIXES)


def _walk(directory: Path) -> Iterator[tuple[str, bool]]:
    """Yield (relative path, is a folder not entered) for everything that is not hidden."""
    for folder, subfolders, files in os.walk(directory, onerror=_refuse):
        base = Path(folder).relative_to(directory)
        for name in sorted(subfolders):
            relative = base / name
            if name.startswith("."):
                subfolders.remove(name)
            elif name in _SKIPPED_FOLDERS or (directory / relative).is_symlink():
                subfolders.remove(name)
                yield relative.as_posix(), True
        for name in files:
            if not name.startswith("."):
                yield (base / name).as_posix(), False


def _refuse(error: OSError) -> NoReturn:
    raise CheckpointError(f"{error.filename}: cannot be listed: {error}") from error


def _check_name(name: str, directory: Path) -> None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{directory}: file name {shown(name)} is not UTF-8; rename or remove the file"
        ) from error
