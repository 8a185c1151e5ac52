"""Whether models speak of the same tokens: distributions over two vocabularies have no divergence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reap_stream.checkpoint.files import read_small
from reap_stream.errors import CheckpointError, UsageError
from reap_stream.model.opened import OpenedModel

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_MAX_NBYTES = 1 << 28


def check_vocabularies(models: Sequence[OpenedModel]) -> None:
    """Refuses models whose token ids do not mean the same as the first model's.

    Raises:
        UsageError: vocabularies of different length, or different tokenizers.
        CheckpointError: a tokenizer's file cannot be read.
    """
    first = models[0]
    for other in models[1:]:
        mine, theirs = _vocabulary(first), _vocabulary(other)
        if mine != theirs:
            message = (
                f"{other.checkpoint.directory}: a vocabulary of {theirs} tokens, that of "
                f"{first.checkpoint.directory} has {mine}: their predictions cannot be compared"
            )
            raise UsageError(message)
        for name in _FILES:
            _check_file(first.checkpoint.directory / name, other.checkpoint.directory / name)


def uncompared(models: Sequence[OpenedModel]) -> Iterator[str]:
    """A note for each model whose tokenizer could not be compared with the first model's."""
    mine = _tokenizer_files(models[0])
    for other in models[1:]:
        theirs = _tokenizer_files(other)
        if mine | theirs and not mine & theirs:
            yield (
                f"{other.checkpoint.directory}: has no tokenizer file that "
                f"{models[0].checkpoint.directory} has too: taken to have the same tokenizer, since "
                "its vocabulary is as long"
            )


def _tokenizer_files(model: OpenedModel) -> set[str]:
    return {name for name in _FILES if (model.checkpoint.directory / name).exists()}


def _vocabulary(model: OpenedModel) -> int:
    return int(model.architecture.embedding.weight.shape[0])


def _check_file(mine: Path, theirs: Path) -> None:
    if not (mine.exists() and theirs.exists()):
        return
    left, right = read_small(mine, _MAX_NBYTES), read_small(theirs, _MAX_NBYTES)
    if left == right or (mine.name == "tokenizer.json" and _same_tokens(left, right)):
        return
    message = (
        f"{theirs} differs from {mine}: the models' predictions are compared token by token, which "
        "needs one tokenizer; evaluate them one by one, or copy the file if they are the same model"
    )
    raise UsageError(message)


def _same_tokens(left: bytes, right: bytes) -> bool:
    """Whether two tokenizer.json files, written in different ways, give the same ids."""
    try:
        mine, theirs = (_encoding(json.loads(raw)) for raw in (left, right))
    except (ValueError, RecursionError) as error:
        message = f"tokenizer.json is no JSON: {error}"
        raise CheckpointError(message) from error
    return bool(mine == theirs)


def _encoding(document: Any) -> Any:
    """What decides the ids of a text: all but how many are padded or cut away."""
    if not isinstance(document, Mapping):
        return document
    return {key: v for key, v in document.items() if key not in ("padding", "truncation")}
