"""Everything a card is made of, as it stands in a pruned checkpoint's `reap` folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from reap_stream.card.base import suggested_name
from reap_stream.card.facts import CARD_FILE, MAX_CARD_NBYTES, SOURCE_CARD_FILE
from reap_stream.card.privacy import of_evaluation, of_run
from reap_stream.card.source import SourceCard, read_source_card
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object
from reap_stream.errors import CheckpointError
from reap_stream.kept_record import recorded_digest
from reap_stream.pruning import RUN_FILE, SCORES_FILE

EVALUATION_FILE: Final = "reap/eval.json"


@dataclass(frozen=True, slots=True)
class CardInputs:
    """What a card is made of.

    Attributes:
        facts: reap/card.json.
        run: reap/run.json, without paths of the machine.
        source: the source's own card.
        evaluation: reap/eval.json, as `reap-stream eval --json` writes it, without paths of the
            machine; None: not evaluated.
        kept_sha256: which experts the pruned model has, as `kept_digest` gives it; None: unknown.
    """

    facts: Mapping[str, Any]
    run: Mapping[str, Any]
    source: SourceCard
    evaluation: Mapping[str, Any] | None = None
    kept_sha256: str | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the job."""
        found: Mapping[str, Any] = self.run["settings"]
        return found

    @property
    def keep(self) -> int:
        """Routed experts in each layer of the pruned model."""
        return int(self.facts["pruned"]["experts"])

    def evaluated(self, candidates: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Those candidates of an evaluation that can be the pruned model."""
        same = [candidate for candidate in candidates if candidate.get("keep") == self.keep]
        if self.kept_sha256 is None:
            return same
        # Written by hand, an evaluation may not say which experts its models have.
        possible = (None, self.kept_sha256)
        return [candidate for candidate in same if candidate.get("kept_sha256") in possible]

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
            "checkpoint. Write it anew, which takes as long as copying it: reap-stream compact "
            f"SOURCE --scores {directory / SCORES_FILE} --keep N --output NEW"
        )
        raise CheckpointError(message)
    source = directory / SOURCE_CARD_FILE
    evaluation = directory / EVALUATION_FILE
    facts = parse_object(read_small(path, MAX_JSON_NBYTES), path)
    layers = facts.get("layers")
    return CardInputs(
        facts=facts,
        run=read_run(directory / RUN_FILE)[1],
        source=read_source_card(read_small(source, MAX_CARD_NBYTES) if source.exists() else None),
        evaluation=read_evaluation(evaluation)[1] if evaluation.exists() else None,
        kept_sha256=recorded_digest(directory, layers) if isinstance(layers, int) else None,
    )


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's record: as it is, and without paths of the machine.

    Raises:
        CheckpointError: it is missing or no record of a run.
    """
    found = parse_object(read_small(path, MAX_JSON_NBYTES), path)
    try:
        return found, of_run(found).document(found)
    except (KeyError, TypeError, AttributeError) as error:
        message = f"{path}: is not as reap-stream writes it: {type(error).__name__}: {error}"
        raise CheckpointError(message) from error


def read_evaluation(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `reap-stream eval --json` wrote: as it is, and without paths of the machine.

    Raises:
        CheckpointError: the file is missing or something else.
    """
    found = parse_object(read_small(path, MAX_JSON_NBYTES), path)
    candidates = found.get("candidates")
    known = found.get("format_version") == 1 and isinstance(candidates, list) and candidates
    whole = known and all(isinstance(candidate, dict) for candidate in candidates or ())
    if not whole or not isinstance(found.get("text"), dict):
        message = f"{path}: no evaluation of `reap-stream eval --json`, or of another version"
        raise CheckpointError(message)
    return found, of_evaluation(found).document(found)


def as_json(document: Mapping[str, Any]) -> bytes:
    """A document as it is written."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
