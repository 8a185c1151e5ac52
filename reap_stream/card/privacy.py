"""Paths of the machine that made a checkpoint are nobody else's business: names stay of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, Final

_ROWS: Final = re.compile(r":[0-9]+\Z")
_PATHS: Final = re.compile(r"\A(?:/|~|\.{1,2}/|[A-Za-z]:\\)")


class Shortener:
    """Puts the last part of a path in its place wherever it stands in a text.

    Args:
        run: what run.json says.
        evaluation: what an evaluation found, or nothing.

    Attributes:
        paths: those that the two speak of.
    """

    def __init__(self, run: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> None:
        found = {_ROWS.sub("", text) for text in (*_run(run), *_evaluation(evaluation or {}))}
        # The longest first: one may lie within another.
        self.paths = sorted(filter(is_path, found), key=lambda path: (-len(path), path))

    def __call__(self, text: str) -> str:
        """The text without directories."""
        for path in self.paths:
            # Not within an address or a longer path.
            whole = rf"(?<![\w/]){re.escape(path)}(?!\w)"
            name = PurePath(path).name or path
            text = re.sub(whole, name.replace("\\", r"\\"), text)
        return text


def is_path(text: str) -> bool:
    """Whether a text is a path that says where it lies: from the root, home, or here."""
    return _PATHS.match(text) is not None


def _run(run: Mapping[str, Any]) -> Iterator[str]:
    settings, calibration = run["settings"], run["calibration"]
    yield str(settings.get("model", ""))
    yield str(run["source"]["path"])
    yield from map(str, calibration["sources"])
    yield from map(str, settings.get("source_weights", {}))
    yield from (
        str(origin["name"])
        for origin in calibration.get("origins", ())
        if origin["kind"] == "file" and is_path(str(origin["name"]))
    )


def _evaluation(evaluation: Mapping[str, Any]) -> Iterator[str]:
    yield from map(str, evaluation.get("text", {}).get("sources", ()))
    for candidate in evaluation.get("candidates", ()):
        yield str(candidate["model"])
        yield str(candidate.get("scores", ""))
        yield str(candidate["label"])
