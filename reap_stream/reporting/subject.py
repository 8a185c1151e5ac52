"""What a report is about: scores, and the choice that was or could be made from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from reap_stream.card.privacy import Shortener
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object, shown
from reap_stream.errors import CheckpointError, UsageError
from reap_stream.kept_record import KEPT_FILE
from reap_stream.scoring.choosing import Chooser
from reap_stream.scoring.saliency import METHODS, Scores
from reap_stream.scoring.scores_file import load_scores
from reap_stream.scoring.selection import parse_targets
from reap_stream.scoring.weights import source_factors
from reap_stream.settings import ChoiceSettings

SCORES_FILE: Final = "reap/scores.safetensors"
RUN_FILE: Final = "reap/run.json"

_OTHER_CHOICE: Final = (
    "The kept experts are not the ones that these scores lead to: the cuts of the curves are where"
    " the kept count falls."
)

Kept = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Subject:
    """Scores and what belongs to them.

    Attributes:
        path: the pruned checkpoint, or the file of scores.
        scores: the statistics.
        chooser: chooses from them as the run did, or as the command says.
        kept: scored layer → experts that stay; None: no target was given.
        run: run.json of a pruned checkpoint; empty for a file of scores.
        notes: what to know of the choice.
    """

    path: Path
    scores: Scores
    chooser: Chooser
    kept: Kept | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_checkpoint(directory: Path) -> Subject:
    """The subject of a pruned checkpoint, every file in it read as a stranger's.

    Raises:
        UsageError: it holds no record of a run, or settings that no run has.
        CheckpointError: its records are damaged, or of another model than its scores.
        CalibrationError: its scores are damaged.
    """
    if not (directory / SCORES_FILE).exists():
        raise UsageError(f"{directory}: no {SCORES_FILE} there{_hint(directory)}")
    scores = load_scores(directory / SCORES_FILE)
    run = _record(directory / RUN_FILE)
    kept, notes = _read_kept(directory, scores)
    chooser, chosen_notes = _as_recorded(_chooser(directory, run, scores), scores, kept)
    return Subject(directory, scores, chooser, kept, run, (*notes, *chosen_notes))


def read_scores(
    path: Path, choice: ChoiceSettings, sparsity: str | None = None, keep: str | None = None
) -> Subject:
    """The subject of a file of scores.

    Args:
        path: the file.
        choice: how experts would be chosen.
        sparsity: fraction of experts to remove, or None.
        keep: experts to keep, or None.

    Raises:
        UsageError: a malformed target, more than one, or weights of unknown sources.
        CalibrationError: the file is damaged.
    """
    scores, choice = _without_directories(load_scores(path), choice)
    factors = source_factors(choice.source_weights, scores.sources)
    chooser = Chooser(choice, factors, 1, 0, {})
    if sparsity is None and keep is None:
        return Subject(path, scores, chooser)
    targets = parse_targets(sparsity, keep, scores.num_experts, 1)
    if len(targets) > 1:
        raise UsageError("a report shows one target: give one --sparsity or --keep")
    kept = {
        layer: chooser.choose(layer, stats, targets[0].keep)
        for layer, stats in scores.layers.items()
    }
    note = (
        "The cut is drawn for a router without groups: a file of scores does not say whether its"
        " model's router has them."
    )
    return Subject(path, scores, chooser, kept, notes=(note,))


def _without_directories(scores: Scores, choice: ChoiceSettings) -> tuple[Scores, ChoiceSettings]:
    """Sources as a page may name them that is passed on."""
    shorten = Shortener(scores.sources)
    weights = tuple((shorten(label), weight) for label, weight in choice.source_weights)
    named = replace(scores, sources=tuple(map(shorten, scores.sources)))
    return named, replace(choice, source_weights=weights)


def _hint(directory: Path) -> str:
    """What else could have been meant."""
    if not directory.is_dir():
        return ": give a pruned checkpoint or a file of scores"
    targets = sorted(path.parent.parent.name for path in directory.glob(f"*/{SCORES_FILE}"))
    if targets:
        return f": give one of the targets in it, {', '.join(targets)}"
    return ": it is no checkpoint that reap-stream pruned"


def _record(path: Path) -> dict[str, Any]:
    return parse_object(read_small(path, MAX_JSON_NBYTES), path)


def _read_kept(directory: Path, scores: Scores) -> tuple[Kept, list[str]]:
    path = directory / KEPT_FILE
    record = _record(path)
    entries, num_experts = record.get("kept"), record.get("num_experts")
    if num_experts != scores.num_experts or not isinstance(entries, dict):
        raise CheckpointError(
            f"{path}: num_experts {shown(num_experts)}, kept {shown(entries)}; the scores are of"
            f" {scores.num_experts} experts in {len(scores.layers)} layers"
        )
    missing = [layer for layer in scores.layers if str(layer) not in entries]
    if missing:
        raise CheckpointError(f"{path}: layer {missing[0]} has scores and no kept experts")
    kept = {layer: _experts(path, entries[str(layer)], layer, scores) for layer in scores.layers}
    others = [name for name in entries if name not in {str(layer) for layer in scores.layers}]
    notes = []
    if others:
        names = ", ".join(shown(name).strip("'") for name in others)
        notes.append(f"Layers without scores of their own, pruned as another layer is: {names}.")
    return kept, notes


def _experts(path: Path, entry: object, layer: int, scores: Scores) -> tuple[int, ...]:
    valid = isinstance(entry, list) and all(type(expert) is int for expert in entry)
    experts = tuple(sorted(entry)) if valid and isinstance(entry, list) else ()
    inside = experts and experts[0] >= 0 and experts[-1] < scores.num_experts
    if not inside or len(set(experts)) != len(experts):
        raise CheckpointError(
            f"{path}: layer {layer}: different experts from 0 to {scores.num_experts - 1} are"
            f" expected, not {shown(entry)}"
        )
    return experts


def _chooser(directory: Path, run: Mapping[str, Any], scores: Scores) -> Chooser:
    """The choice as run.json has it."""
    path, settings = directory / RUN_FILE, run.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    method, seed = settings.get("method", "reap"), settings.get("seed", 0)
    weights, protected = settings.get("source_weights", {}), run.get("protected", {})
    if method not in METHODS or type(seed) is not int or seed < 0:
        raise CheckpointError(
            f"{path}: method {shown(method)}, seed {shown(seed)}: no run has them"
        )
    if not isinstance(weights, dict) or not all(_is_number(value) for value in weights.values()):
        raise CheckpointError(f"{path}: source_weights {shown(weights)}: numbers are expected")
    if not isinstance(protected, dict):
        raise CheckpointError(f"{path}: protected {shown(protected)}: layers are expected")
    choice = ChoiceSettings(method, seed, tuple(weights.items()))
    stay = {
        layer: _experts(path, protected[str(layer)], layer, scores)
        for layer in scores.layers
        if str(layer) in protected
    }
    return Chooser(choice, source_factors(choice.source_weights, scores.sources), 1, 0, stay)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _as_recorded(chooser: Chooser, scores: Scores, kept: Kept) -> tuple[Chooser, list[str]]:
    """The chooser with the router's groups: those with which the scores lead to what was kept."""
    counts = {len(experts) for experts in kept.values()}
    if len(counts) == 1:
        for groups in _divisors(scores.num_experts, *counts):
            candidate = replace(chooser, groups=groups)
            if _chooses(candidate, scores, kept):
                return candidate, []
    return chooser, [_OTHER_CHOICE]


def _chooses(chooser: Chooser, scores: Scores, kept: Kept) -> bool:
    try:
        return all(
            chooser.choose(layer, stats, len(kept[layer])) == kept[layer]
            for layer, stats in scores.layers.items()
        )
    except UsageError:
        # More protected experts than places in a group of this many.
        return False


def _divisors(num_experts: int, keep: int) -> Iterator[int]:
    return (n for n in range(1, keep + 1) if num_experts % n == 0 and keep % n == 0)
