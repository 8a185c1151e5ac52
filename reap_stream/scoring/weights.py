"""How much each calibration source counts: ``SOURCE=2,OTHER=1``, by the labels of the scores.

A label is a SPEC text and may itself hold ``=`` and ``,``. So a list is read by the labels there
are; where it fits none, it is cut behind every ``=NUMBER`` and the name that is unknown is refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from reap_stream.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

SourceWeights = tuple[tuple[str, float], ...]

_NUMBER = re.compile(r"=([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})(?:,|\Z)")
_ENTRY = re.compile(rf"(?s:(.+?)){_NUMBER.pattern}")
_COUNT = re.compile(r"(?s:(.+)):[0-9]{1,18}")


def parse_source_weights(text: str | None, labels: Sequence[str]) -> SourceWeights:
    """Read ``SOURCE=WEIGHT[,SOURCE=WEIGHT...]``.

    Args:
        text: the list; None for no weights.
        labels: labels of the calibration sources.

    Returns:
        Label and weight of each entry, labels in full, in the order given.

    Raises:
        UsageError: it is no such list, or `source_factors` would refuse it.
    """
    if text is None:
        return ()
    names = _names(labels)
    entries = _read(text, sorted(names, key=len, reverse=True))
    if entries is None:
        entries = _cut(text)
    weights = tuple((names.get(name, name), weight) for name, weight in entries)
    source_factors(weights, labels)
    return weights


def source_factors(weights: SourceWeights, labels: Sequence[str]) -> NDArray[np.float64]:
    """The factor of each source; 1 where none is named.

    Args:
        weights: a source's label, or the label without its ``:N`` where only one is so called, and
            its weight, 0 or more; 0 leaves the source out.
        labels: labels of the calibration sources.

    Returns:
        float64 [sources].

    Raises:
        UsageError: an unknown label, one named twice, a weight below 0 or not finite, or no weight
            above 0.
    """
    names = _names(labels)
    given: dict[str, float] = {}
    for name, weight in weights:
        if name not in names:
            raise UsageError(f"no calibration source {name!r}: there are {_listed(labels)}")
        label = names[name]
        if label in given:
            raise UsageError(f"calibration source {label!r} has two weights: leave one out")
        if not 0 <= weight < np.inf:
            raise UsageError(
                f"the weight of calibration source {label!r} is {weight}: give 0 to leave it out,"
                " or a number above"
            )
        given[label] = weight
    factors = np.array([given.get(label, 1.0) for label in labels], dtype=np.float64)
    if not factors.any():
        raise UsageError(
            f"all calibration sources have the weight 0: leave one of {_listed(labels)} in"
        )
    return factors


def _names(labels: Sequence[str]) -> Mapping[str, str]:
    """What each label may be called: itself, and without its count where no other is so called."""
    short: dict[str, list[str]] = {}
    for label in labels:
        match = _COUNT.fullmatch(label)
        if match:
            short.setdefault(match[1], []).append(label)
    single = {name: found[0] for name, found in short.items() if len(found) == 1}
    return {**single, **{label: label for label in labels}}


def _read(text: str, names: Sequence[str]) -> list[tuple[str, float]] | None:
    """The entries, each named by one of `names`; None where the text cannot be read so."""
    # Start of a rest that can be read → its entries, from the end on: a name may begin another.
    read: dict[int, list[tuple[str, float]]] = {len(text): []}
    for start in reversed(range(len(text))):
        for name in names:
            match = _NUMBER.match(text, start + len(name))
            if match and text.startswith(name, start) and match.end() in read:
                read[start] = [(name, float(match[1])), *read[match.end()]]
                break
    return read.get(0)


def _cut(text: str) -> list[tuple[str, float]]:
    entries, start = [], 0
    while start < len(text):
        match = _ENTRY.match(text, start)
        if match is None:
            raise UsageError(
                f"source weights {text!r}: {text[start:]!r} is no SOURCE=WEIGHT: give 0 or a number"
                " above for each, such as code.jsonl=2,prose.jsonl=1"
            )
        entries.append((match[1], float(match[2])))
        start = match.end()
    return entries


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(repr(label) for label in labels)
