"""Whether two checkpoints have the same head, so that one of them need be in memory.

Told apart too often rather than too seldom: a difference that means nothing costs some memory, one
that is overlooked makes wrong numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from reap_stream.checkpoint.reader import Reader
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.model.opened import OpenedModel
from reap_stream.model.roles import Feed

_PIECE_NBYTES = 8 * 2**20
# What a config says of files, of the dtype (compared as it is computed in), of the formats of
# weights (compared for those of the head), and of prediction layers.
_QUANTISATION = ("quantization_config", "compression_config", "quantization")
_IGNORED = re.compile(
    r"_name_or_path|transformers_version|(?:torch_)?dtype|\w*nextn\w*|\w*mtp\w*|"
    + "|".join(_QUANTISATION)
)


def same_computation(one: OpenedModel, other: OpenedModel) -> bool:
    """Whether two models are of one class, compute in one dtype, and have like configs.

    Configs are alike that differ in the number of experts, in names and in formats alone.
    """
    mine, theirs = one.architecture, other.architecture
    if type(mine.model) is not type(theirs.model) or mine.model.dtype != theirs.model.dtype:
        return False
    counts = frozenset({*mine.count_paths, *theirs.count_paths})
    return bool(_told(one.checkpoint.config, counts) == _told(other.checkpoint.config, counts))


def same_decoding(
    one: tuple[OpenedModel, Iterable[Feed]], other: tuple[OpenedModel, Iterable[Feed]]
) -> bool:
    """Whether equal bytes make equal parameters in two models.

    Args:
        one: a model, and what parameters of it are made of.
        other: another, and what the same parameters are made of there.
    """
    forms = [[_form(feed) for feed in feeds] for _, feeds in (one, other)]
    if forms[0] != forms[1]:
        return False
    weights = (weight for feed in one[1] for _, group in feed.groups for weight in group)
    if all(weight.is_plain for weight in weights):
        return True
    mine, theirs = one[0].checkpoint.config, other[0].checkpoint.config
    return all(mine.get(key) == theirs.get(key) for key in _QUANTISATION)


def same_bytes(reader: Reader, one: Sequence[TensorRef], other: Sequence[TensorRef]) -> bool:
    """Whether tensors hold the same, whatever their names; reads them in small pieces.

    Raises:
        ReadError: one cannot be read.
    """
    if [(ref.dtype, ref.shape) for ref in one] != [(ref.dtype, ref.shape) for ref in other]:
        return False
    return all(_equal(reader, *pair) for pair in zip(one, other, strict=True))


def _told(config: Mapping[str, Any], counts: frozenset[tuple[str, ...]]) -> dict[str, Any]:
    """A config without numbers of experts, names and formats."""
    inner = [frozenset(path[1:] for path in counts if path[:1] == (key,)) for key in config]
    return {
        key: _told(value, below) if isinstance(value, Mapping) else value
        for (key, value), below in zip(config.items(), inner, strict=True)
        if () not in below and not _IGNORED.fullmatch(key)
    }


def _form(feed: Feed) -> list[Any]:
    return [
        (pattern, [(w.format.name, w.shape, w.transposed, list(w.parts)) for w in weights])
        for pattern, weights in feed.groups
    ]


def _equal(reader: Reader, one: TensorRef, other: TensorRef) -> bool:
    if one.offset == other.offset and one.file.resolve() == other.file.resolve():
        return True
    pieces = np.empty((2, min(_PIECE_NBYTES, one.nbytes)), dtype=np.uint8)
    for start in range(0, one.nbytes, _PIECE_NBYTES):
        nbytes = min(_PIECE_NBYTES, one.nbytes - start)
        mine, theirs = (piece[:nbytes] for piece in pieces)
        reader.read_into([(one, start, nbytes, mine), (other, start, nbytes, theirs)])
        if not np.array_equal(mine, theirs):
            return False
    return True
