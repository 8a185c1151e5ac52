"""What `reap-stream eval` found, read from its file as from a stranger's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object, shown
from reap_stream.errors import CheckpointError

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One candidate.

    Attributes:
        label: what it is called.
        method: the criterion; empty for a checkpoint as it is.
        keep: routed experts in each layer.
        tokens: predicted tokens.
        loss: in nats a token; None where it is no finite number.
        kl: KL divergence from the reference in nats a token; None likewise.
        top1: share of tokens whose likeliest next token is the reference's; None likewise.
        errors: layer → relative error of the hidden states after it.
    """

    label: str
    method: str
    keep: int
    tokens: int
    loss: float | None
    kl: float | None
    top1: float | None
    errors: Mapping[int, float]


def read_evaluation(path: Path) -> tuple[Evaluated, ...]:
    """All candidates, the reference first.

    Raises:
        CheckpointError: the file is missing, damaged or no evaluation.
    """
    document = parse_object(read_small(path, MAX_JSON_NBYTES), path)
    candidates = document.get("candidates")
    if document.get("format_version") != FORMAT_VERSION or not isinstance(candidates, list):
        raise CheckpointError(
            f"{path}: is no evaluation of format version {FORMAT_VERSION}; give a file of"
            " reap-stream eval --output"
        )
    if not candidates:
        raise CheckpointError(f"{path}: an evaluation of nothing")
    return tuple(_candidate(entry, path) for entry in candidates)


def _candidate(entry: Any, path: Path) -> Evaluated:
    figures = entry.get("all") if isinstance(entry, dict) else None
    if not isinstance(figures, dict):
        raise CheckpointError(f"{path}: a candidate with figures is expected, not {shown(entry)}")
    label, method, keep = entry.get("label"), entry.get("method", ""), entry.get("keep")
    tokens = figures.get("tokens")
    named = isinstance(label, str) and isinstance(method, str)
    if not named or type(keep) is not int or type(tokens) is not int or min(keep, tokens) < 1:
        raise CheckpointError(
            f"{path}: a candidate with label {shown(label)}, method {shown(method)},"
            f" keep {shown(keep)} and {shown(tokens)} tokens"
        )
    return Evaluated(
        str(label),
        str(method),
        keep,
        tokens,
        _figure(figures, "loss", path),
        _figure(figures, "kl", path),
        _figure(figures, "top1_agreement", path),
        _errors(entry.get("layers", []), path),
    )


def _figure(figures: Mapping[str, Any], name: str, path: Path) -> float | None:
    value = figures.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise CheckpointError(f"{path}: {name} is {shown(value)}, a number is expected")
    return float(value)


def _errors(layers: Any, path: Path) -> dict[int, float]:
    errors = {}
    for entry in layers if isinstance(layers, list) else [layers]:
        layer = entry.get("layer") if isinstance(entry, dict) else None
        if type(layer) is not int or layer < 0:
            raise CheckpointError(f"{path}: a layer's error is expected, not {shown(entry)}")
        value = _figure(entry, "relative_error", path)
        if value is not None:
            errors[layer] = value
    return errors
