"""The record of the kept experts in a pruned checkpoint, read as a stranger's file."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Final

from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.publish import RECORDS
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object, shown
from reap_stream.errors import CheckpointError, UnsupportedError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet
    from pathlib import Path

KEPT_FILE: Final = f"{RECORDS}/kept_experts.json"


def read_kept(directory: Path, num_experts: int, layers: AbstractSet[int]) -> dict[int, list[int]]:
    """The kept experts that a checkpoint says it has, not checked against a plan yet.

    Args:
        directory: the pruned checkpoint.
        num_experts: experts in every layer of its source.
        layers: the source's layers with experts.

    Returns:
        Layer → source numbers of the kept experts.

    Raises:
        VerificationError: the record is missing, malformed or of another source.
        UnsupportedError: the source has no layer with experts.
    """
    path = directory / KEPT_FILE
    try:
        record = parse_object(read_small(path, MAX_JSON_NBYTES), path)
    except CheckpointError as error:
        raise VerificationError(str(error)) from error
    if record.get("num_experts") != num_experts:
        raise VerificationError(
            f"{path}: num_experts is {shown(record.get('num_experts'))}, "
            f"the source has {num_experts} experts"
        )
    if not layers:
        raise UnsupportedError(f"{directory}: its source has no layer with experts to prune")
    entries, names = record.get("kept"), {str(layer) for layer in layers}
    if not isinstance(entries, dict) or entries.keys() != names:
        raise VerificationError(
            f"{path}: kept must map layers {', '.join(map(str, sorted(layers)))} to experts, "
            f"not be {shown(entries)}"
        )
    for layer, experts in entries.items():
        if (
            not isinstance(experts, list)
            or not 1 <= len(experts) <= num_experts
            or any(type(expert) is not int for expert in experts)
        ):
            raise VerificationError(
                f"{path}: layer {layer}: 1 to {num_experts} expert numbers are expected, "
                f"not {shown(experts)}"
            )
    return {int(layer): experts for layer, experts in entries.items()}


def kept_digest(kept: Mapping[int, Sequence[int]], num_layers: int) -> str:
    """SHA-256 of a choice of experts: two prunings of a model are the same where it is.

    Args:
        kept: layer → numbers of the kept experts.
        num_layers: decoder layers; next-token-prediction layers stand behind them and do not count.
    """
    chosen = {str(layer): list(kept[layer]) for layer in sorted(kept) if layer < num_layers}
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()


def recorded_digest(directory: Path, num_layers: int) -> str | None:
    """`kept_digest` of a pruned checkpoint; None where it has no record that can be read."""
    path = directory / KEPT_FILE
    try:
        entries = parse_object(read_small(path, MAX_JSON_NBYTES), path)["kept"]
        return kept_digest({int(layer): experts for layer, experts in entries.items()}, num_layers)
    except (CheckpointError, KeyError, ValueError, TypeError, AttributeError):
        return None
