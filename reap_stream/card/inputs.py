"""Everything a card is made of, as it stands in a pruned checkpoint's `reap` folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from reap_stream.card.base import suggested_name
from reap_stream.card.facts import CARD_FILE, MAX_CARD_NBYTES, SOURCE_CARD_FILE
from reap_stream.card.source import SourceCard, read_source_card
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object
from reap_stream.errors import CheckpointError
from reap_stream.pruning import RUN_FILE

EVALUATION_FILE: Final = "reap/eval.json"


@dataclass(frozen=True, slots=True)
class CardInputs:
    """What a card is made of.

    Attributes:
        facts: reap/card.json.
        run: reap/run.json.
        source: the source's own card.
        evaluation: reap/eval.json, as `reap-stream eval --json` writes it; None: not evaluated.
    """

    facts: Mapping[str, Any]
    run: Mapping[str, Any]
    source: SourceCard
    evaluation: Mapping[str, Any] | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the job."""
        found: Mapping[str, Any] = self.run["settings"]
        return found

    @property
    def keep(self) -> int:
        """Routed experts in each layer of the pruned model."""
        return int(self.facts["pruned"]["experts"])

    @property
    def base(self) -> str:
        """What the source is called: its id where that is known, else its name."""
        base = self.facts["base"]
        return str(base["repository"] or base["name"])

    @property
    def name(self) -> str:
        """What the pruned model may be called."""
        pruned = self.facts["pruned"]
        return suggested_name(
            self.facts["base"]["name"],
            self.settings["method"],
            (pruned["parameters"], pruned["active_parameters"]),
            self.settings["weights"],
            self.facts["quantization"],
        )


def read_inputs(directory: Path) -> CardInputs:
    """Reads what a pruned checkpoint's card is made of.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = directory / CARD_FILE
    if not path.exists():
        message = (
            f"{path}: missing, so there are no facts for a card: another version wrote the "
            "checkpoint. `reap-stream compact` with its reap/scores.safetensors writes it anew"
        )
        raise CheckpointError(message)
    source = directory / SOURCE_CARD_FILE
    evaluation = directory / EVALUATION_FILE
    return CardInputs(
        facts=parse_object(read_small(path, MAX_JSON_NBYTES), path),
        run=parse_object(read_small(directory / RUN_FILE, MAX_JSON_NBYTES), directory / RUN_FILE),
        source=read_source_card(read_small(source, MAX_CARD_NBYTES) if source.exists() else None),
        evaluation=read_evaluation(evaluation) if evaluation.exists() else None,
    )


def read_evaluation(path: Path) -> dict[str, Any]:
    """What `reap-stream eval --json` wrote.

    Raises:
        CheckpointError: the file is missing or something else.
    """
    found = parse_object(read_small(path, MAX_JSON_NBYTES), path)
    candidates = found.get("candidates")
    known = found.get("format_version") == 1 and isinstance(candidates, list) and candidates
    if not known or not isinstance(found.get("text"), dict):
        message = f"{path}: no evaluation of `reap-stream eval --json`, or of another version"
        raise CheckpointError(message)
    return found


def as_json(document: Mapping[str, Any]) -> bytes:
    """A document as it is written."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
