"""Which model was cut, where that can be told, and what the pruned one may be called."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from reap_stream.checkpoint.source import Checkpoint

# A snapshot of the Hub's cache: models--ORG--NAME/snapshots/COMMIT.
_CACHE: Final = re.compile(r"models--(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_FORMAT: Final = re.compile(
    r"-(?:bf16|fp16|fp8(?:-dynamic|-block)?|nvfp4|mxfp4|fp4|awq|gptq|int[48]|w\d+a\d+)$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Base:
    """The model that was cut.

    Attributes:
        name: last part of its id, or of its directory.
        repository: its id on the Hub; None where nothing tells.
        revision: the commit; None where nothing tells.
    """

    name: str
    repository: str | None = None
    revision: str | None = None

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def base_of(checkpoint: Checkpoint) -> Base:
    """The model that a checkpoint is: from the Hub, from its cache, or a directory.

    What the source's card calls *its* base is not what was cut, and a directory's name proves
    nothing, so these are not taken for an id.
    """
    if checkpoint.origin is not None:
        return Base(checkpoint.name, checkpoint.origin.repository, checkpoint.origin.revision)
    return _cached(checkpoint.directory) or Base(checkpoint.name)


def _cached(directory: Path) -> Base | None:
    snapshot = directory.absolute()
    match = _CACHE.fullmatch(snapshot.parent.parent.name)
    in_cache = snapshot.parent.name == "snapshots" and _COMMIT.fullmatch(snapshot.name)
    if match is None or not in_cache:
        return None
    return Base(match["name"], f"{match['org']}/{match['name']}", snapshot.name)


def suggested_name(
    base: str, method: str, parameters: tuple[int, int], weights: str, quantization: str | None
) -> str:
    """`<Base>-REAP-<total>B-A<active>B[-<format>]`, as such models are called on the Hub.

    Args:
        base: name of the model that was cut.
        method: the criterion; what was not cut by REAP is not called so.
        parameters: of the pruned model: in all, and those a token uses.
        weights: how weights were written, as `--weights`.
        quantization: the format of the pruned model's weights, e.g. ``FP8``; None: plain.
    """
    match = _FORMAT.search(base)
    suffix = match[0] if match else ""
    if weights != "keep" or not suffix:
        suffix = f"-{quantization}" if quantization == "FP8" else ""
    total, active = map(short_count, parameters)
    return f"{_FORMAT.sub('', base)}-{method.upper()}-{total}-A{active}{suffix}"


def short_count(count: int) -> str:
    """A number of parameters as names give it: ``217B``, ``1.5B``, ``350M``."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            value = count / unit
            return f"{value:.1f}{letter}" if value < 1.95 else f"{value:.0f}{letter}"
    return str(count)
