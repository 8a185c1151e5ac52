"""The source's own card, a stranger's file: what is inherited from it, and its text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

from huggingface_hub import ModelCard

# As huggingface_hub finds it; spaces before it are no fault there.
_FRONT_MATTER: Final = re.compile(
    r"\A\ufeff?\s*---\r?\n(?P<yaml>.*?\r?\n)??---[ \t]*(?:\r?\n|\Z)", re.DOTALL
)
_INHERITED: Final = ("license", "license_name", "license_link", "language", "pipeline_tag")


@dataclass(frozen=True, slots=True)
class SourceCard:
    """A card taken apart.

    Attributes:
        metadata: its front matter; empty where it has none that can be read.
        text: all else.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    def inherited(self) -> dict[str, Any]:
        """Entries that hold for the pruned model as well; values of other kinds than the Hub's left out."""
        found = {}
        for key in _INHERITED:
            value = self.metadata.get(key)
            if isinstance(value, str) or (key in ("language", "license") and _are_texts(value)):
                found[key] = value
        return found


def read_source_card(raw: bytes | None) -> SourceCard:
    """Takes a card apart; what cannot be read of it is left out."""
    if raw is None:
        return SourceCard()
    text = raw.decode("utf-8", errors="replace")
    match = _FRONT_MATTER.match(text)
    if match is None:
        return SourceCard({}, text.lstrip("\ufeff").strip())
    return SourceCard(_metadata(match["yaml"] or ""), text[match.end() :].strip())


def _metadata(block: str) -> dict[str, Any]:
    try:
        card = ModelCard(f"---\n{block}\n---\n", ignore_metadata_errors=True)
    except Exception:  # noqa: BLE001 - of a stranger's YAML; its parser's errors have no base but this
        return {}
    return {key: value for key, value in vars(card.data).items() if value is not None}


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
