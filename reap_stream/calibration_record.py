"""What a file of scores says of the data it was taken on, so that `compact` can say it again.

The file's metadata holds texts: ``calibration_sha256``, ``tokens``, ``propagate``, and ``origins``: the
records of `calibration.corpus.Origin` as a JSON list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from reap_stream.errors import CalibrationError

_ORIGINS: Final = "origins"
_TEXTS: Final = ("source", "kind", "name", "sha256")
_OTHER_TEXTS: Final = ("config", "split", "revision", "reader")
_COUNTS: Final = ("rows", "tokens")


def score_metadata(calibration: Mapping[str, Any], propagate: str | None) -> dict[str, str]:
    """Metadata of a file of scores.

    Args:
        calibration: of run.json.
        propagate: what later layers saw; None: not known.
    """
    found = {
        "calibration_sha256": calibration.get("sha256", calibration.get("calibration_sha256")),
        "tokens": calibration.get("tokens"),
        "propagate": propagate,
    }
    texts = {key: str(value) for key, value in found.items() if value is not None}
    origins = calibration.get(_ORIGINS)
    return {**texts, _ORIGINS: json.dumps(origins, ensure_ascii=False)} if origins else texts


def calibration_record(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """The part of run.json that follows from a file of scores.

    Args:
        metadata: the file's.
        where: the file, for the message.

    Raises:
        CalibrationError: `origins` is not as this package writes it.
    """
    record: dict[str, Any] = dict(metadata)
    if _ORIGINS in metadata:
        record[_ORIGINS] = _read_origins(metadata[_ORIGINS], where)
    return record


def _read_origins(text: str, where: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: metadata 'origins' is no JSON: {error}") from error
    if not isinstance(found, list) or not all(map(_is_origin, found)):
        raise CalibrationError(
            f"{where}: metadata 'origins' must be a JSON list of the calibration sources' records"
        )
    return found


def _is_origin(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str) for key in _TEXTS)
        and all(isinstance(entry.get(key, ""), str) for key in _OTHER_TEXTS)
        and all(type(entry.get(key)) is int for key in _COUNTS)
    )
