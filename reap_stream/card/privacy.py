"""Paths of the machine that made a checkpoint are nobody else's business: names stay of them.

People's and companies' names stand in such paths, and what is published is copied for ever. So the
records of a pruned checkpoint are written without them; relative paths below the working directory
stay as they were given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

_ROWS: Final = re.compile(r":[0-9]+\Z")
_PATHS: Final = re.compile(r"\A(?:[/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\])")
_SEPARATORS: Final = re.compile(r"[/\\]")


class Shortener:
    """Puts the last part of a path in its place wherever it stands in a text.

    Args:
        sources: labels of data, which must stay different: where two paths end alike, their names
            begin with a number, as ``1/rows.jsonl`` and ``2/rows.jsonl``.
        others: texts that are paths, however they look.

    Attributes:
        names: path → what stands in its place; nothing that would stay as it is.
    """

    def __init__(self, sources: Iterable[str], others: Iterable[str] = ()) -> None:
        found = dict.fromkeys(_ROWS.sub("", label) for label in sources)
        names = {path: _last_part(path) for path in others}
        names |= _different(filter(is_path, found), {text for text in found if not is_path(text)})
        # The longest first: one may lie within another.
        ordered = sorted(names, key=lambda path: (-len(path), path))
        self.names = {path: names[path] for path in ordered if path != names[path]}

    def __call__(self, text: str) -> str:
        """The text without directories."""
        for path, name in self.names.items():
            # Not within an address or a longer path.
            whole = rf"(?<![\w/.-]){re.escape(path)}(?![\w-])"
            text = re.sub(whole, name.replace("\\", r"\\"), text)
        return text

    def document(self, value: Any) -> Any:
        """JSON values, keys of objects too, without directories."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {self.document(key): self.document(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.document(entry) for entry in value]
        return value


def of_run(run: Mapping[str, Any]) -> Shortener:
    """The shortener of a run's record."""
    settings, calibration, source = run["settings"], run["calibration"], run["source"]
    sources = [*calibration["sources"], *settings.get("source_weights", {})]
    sources += [
        origin["name"] for origin in calibration.get("origins", ()) if origin["kind"] == "file"
    ]
    others = {str(source["path"])}
    if "repository" not in source and "model" in settings:
        others.add(str(settings["model"]))
    return Shortener(map(str, sources), others)


def of_evaluation(evaluation: Mapping[str, Any]) -> Shortener:
    """The shortener of an evaluation."""
    return Shortener(map(str, evaluation["text"].get("sources", ())), _candidates(evaluation))


def is_path(text: str) -> bool:
    """Whether a text is a path that says where it lies: from the root, home, or here."""
    return _PATHS.match(text) is not None


def _candidates(evaluation: Mapping[str, Any]) -> Iterator[str]:
    for candidate in evaluation["candidates"]:
        texts = (str(candidate.get(key, "")) for key in ("model", "scores", "label"))
        # Else a model may be one of the Hub.
        yield from filter(is_path, texts)


def _last_part(path: str) -> str:
    parts = [part for part in _SEPARATORS.split(path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else path


def _different(paths: Iterable[str], taken: set[str]) -> dict[str, str]:
    """A name for each path; two paths never share one."""
    same: dict[str, list[str]] = {}
    for path in paths:
        same.setdefault(_last_part(path), []).append(path)
    found = {}
    for name, own in same.items():
        alone = len(own) == 1 and name not in taken
        for number, path in enumerate(own, start=1):
            found[path] = name if alone else f"{number}/{name}"
    return found
