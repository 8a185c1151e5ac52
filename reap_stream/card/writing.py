"""README.md of a pruned checkpoint: with its first rendering, and anew at any time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from reap_stream.card.facts import (
    CARD_FILE,
    CARD_NAME,
    MAX_CARD_NBYTES,
    SOURCE_CARD_FILE,
    card_facts,
    source_card,
)
from reap_stream.card.inputs import (
    EVALUATION_FILE,
    CardInputs,
    as_json,
    read_evaluation,
    read_inputs,
)
from reap_stream.card.records import records_without_paths
from reap_stream.card.sections import render
from reap_stream.card.source import read_source_card
from reap_stream.checkpoint.atomic import write_atomically
from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.errors import CheckpointError, UsageError
from reap_stream.hub.names import parse_hub_name
from reap_stream.model.opened import OpenedModel
from reap_stream.pruning import Variant
from reap_stream.records import Summary


def card_documents(model: OpenedModel, variant: Variant, summary: Summary) -> dict[str, bytes]:
    """The card of a checkpoint that is being written, and what it will be rendered from again.

    Args:
        model: the source.
        variant: what was written.
        summary: what the job did, without paths of the machine.

    Returns:
        Contents by relative path.
    """
    facts = card_facts(model, variant, summary.details["settings"]["mtp"])
    original = source_card(model.checkpoint)
    run = json.loads(summary.document())
    inputs = CardInputs(facts, run, read_source_card(original))
    kept = {} if original is None else {SOURCE_CARD_FILE: original}
    return {CARD_FILE: as_json(facts), **kept, CARD_NAME: render(inputs).encode()}


def rewrite_card(
    directory: Path, evaluation: Path | None = None, base_model: str | None = None
) -> list[str]:
    """Renders README.md of a pruned checkpoint anew.

    Args:
        directory: the checkpoint.
        evaluation: what `reap-stream eval --json` wrote; it is put into the checkpoint.
        base_model: id on the Hub of the model that was cut, for the record.

    Returns:
        The files that were written, relative paths.

    Raises:
        CheckpointError: what the card is made of is missing or damaged.
        UsageError: the evaluation is of other models.
        OutputError: a file could not be written.
    """
    inputs = read_inputs(directory)
    written = records_without_paths(directory)
    if base_model is not None:
        inputs = _with_base(inputs, base_model)
        written[CARD_FILE] = as_json(inputs.facts)
    if evaluation is not None:
        found = read_evaluation(evaluation)[1]
        _check_evaluation(inputs, found, evaluation)
        _check_weights(inputs, found, evaluation, directory)
        inputs = replace(inputs, evaluation=found)
        written[EVALUATION_FILE] = as_json(found)
    written[CARD_NAME] = rendered(directory, inputs)
    for name, data in written.items():
        write_atomically(directory / name, [data], len(data))
    return list(written)


def rendered(directory: Path, inputs: CardInputs) -> bytes:
    """README.md as it follows from what was read from a directory.

    Raises:
        CheckpointError: that is not what this package writes.
    """
    try:
        text = render(inputs).encode()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        message = (
            f"{directory}: {CARD_FILE}, reap/run.json or {EVALUATION_FILE} is not as reap-stream "
            f"writes it: {type(error).__name__}: {error}"
        )
        raise CheckpointError(message) from error
    if len(text) > 2 * MAX_CARD_NBYTES:
        message = f"{directory}: a card of {len(text)} bytes; shorten {SOURCE_CARD_FILE}"
        raise CheckpointError(message)
    return text


def _with_base(inputs: CardInputs, base_model: str) -> CardInputs:
    name = parse_hub_name(base_model)
    if name is None:
        message = f"--base-model {base_model}: no id on the Hub such as org/name[@revision]"
        raise UsageError(message)
    known: dict[str, Any] = inputs.facts["base"]
    same = known["repository"] == name.repository
    base = {
        "name": name.repository.rpartition("/")[2],
        "repository": name.repository,
        "revision": name.revision or (known["revision"] if same else None),
    }
    return replace(inputs, facts={**inputs.facts, "base": base})


def _check_evaluation(inputs: CardInputs, found: dict[str, Any], path: Path) -> None:
    """Refuses an evaluation of models that cannot be this one and its source."""
    counts = [candidate.get("keep") for candidate in found["candidates"]]
    wanted = (inputs.facts["source"]["experts"], inputs.keep)
    if counts[0] != wanted[0] or wanted[1] not in counts:
        message = (
            f"{path}: compares models of {counts} experts; for this card the first must be the "
            f"source ({wanted[0]}), and one the pruned model ({wanted[1]})"
        )
        raise UsageError(message)
    if not inputs.evaluated(found["candidates"]):
        message = (
            f"{path}: its models of {wanted[1]} experts keep others than this one does: evaluate "
            "this checkpoint"
        )
        raise UsageError(message)


def _check_weights(inputs: CardInputs, found: dict[str, Any], path: Path, directory: Path) -> None:
    """Refuses figures of other bytes: the same experts may have been written in another format."""
    reference, source = found["candidates"][0].get("fingerprint"), inputs.run["source"]
    # A model has one fingerprint on the Hub and another in a directory.
    if "repository" not in source and reference not in (None, source.get("fingerprint")):
        message = (
            f"{path}: its first model is not the one that was cut (fingerprint {reference}, that has "
            f"{source.get('fingerprint')}): evaluate with the source first"
        )
        raise UsageError(message)
    own = [candidate.get("fingerprint") for candidate in inputs.evaluated(found["candidates"])]
    if None not in own and open_checkpoint(directory).fingerprint not in own:
        message = (
            f"{path}: is of other weights with the same experts, or of {directory} as it was before: "
            "evaluate this checkpoint"
        )
        raise UsageError(message)
