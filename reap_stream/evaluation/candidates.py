"""Who takes part in an evaluation: checkpoints as they are, and prunings that were never written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reap_stream.errors import UsageError
from reap_stream.model.opened import OpenedModel
from reap_stream.pruning import Kept
from reap_stream.scores_fit import check_scores
from reap_stream.scoring.choosing import choose_experts
from reap_stream.scoring.saliency import Scores
from reap_stream.scoring.scores_file import load_scores
from reap_stream.scoring.selection import check_routing, kept_count, parse_targets
from reap_stream.settings import Candidate


@dataclass(frozen=True, slots=True)
class Contestant:
    """One of those that are compared.

    Attributes:
        label: what it is called in results.
        model: number of the directory whose weights it has.
        keep: routed experts in each of its layers.
        candidate: how it is pruned; None: it is a checkpoint as it is.
        kept: its experts by layer, numbered as in the checkpoint; None: all.
    """

    label: str
    model: int
    keep: int
    candidate: Candidate | None = None
    kept: Kept | None = None


def contestants(
    paths: Sequence[Path], models: Sequence[OpenedModel], candidates: Sequence[Candidate]
) -> list[Contestant]:
    """All that are compared: the reference, the other checkpoints, then what was never written.

    Args:
        paths: directories of the checkpoints, the reference first.
        models: the same, opened.
        candidates: prunings of the reference.

    Raises:
        UsageError: scores of another model, a target that leaves the router too few experts, or
            two candidates that are the same.
        CalibrationError: a file of scores is damaged.
    """
    written = [
        Contestant(label, number, model.architecture.num_experts)
        for number, (label, model) in enumerate(zip(_names(paths, models), models, strict=True))
    ]
    chooser = _Chooser(models[0], len({candidate.scores for candidate in candidates}) > 1)
    unwritten = [chooser.contestant(candidate) for candidate in candidates]
    everyone = [*written, *unwritten]
    labels = [contestant.label for contestant in everyone]
    repeated = [label for label in labels if labels.count(label) > 1]
    if repeated:
        message = f"two candidates are called {repeated[0]!r}: leave one out or give them labels"
        raise UsageError(message)
    return everyone


def _names(paths: Sequence[Path], models: Sequence[OpenedModel]) -> list[str]:
    """The checkpoints' own names, or whole paths where these are not told apart by them."""
    names = [model.checkpoint.name for model in models]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


class _Chooser:
    """Chooses experts of one model from files of scores, each read once."""

    def __init__(self, model: OpenedModel, names_files: bool) -> None:
        self._model = model
        self._names_files = names_files
        self._read: dict[Path, Scores] = {}

    def contestant(self, candidate: Candidate) -> Contestant:
        scores = self._scores(candidate.scores)
        keep = self._keep(candidate)
        architecture = self._model.architecture
        kept = choose_experts(
            scores.layers,
            scores.sources,
            keep,
            candidate.choice,
            groups=architecture.routing.groups,
            num_layers=architecture.num_layers,
        )
        label = candidate.label or self._label(candidate, keep)
        return Contestant(label, 0, keep, candidate, kept)

    def _scores(self, path: Path) -> Scores:
        if path not in self._read:
            scores = load_scores(path)
            check_scores(self._model, scores, path)
            self._read[path] = scores
        return self._read[path]

    def _keep(self, candidate: Candidate) -> int:
        architecture = self._model.architecture
        routing = architecture.routing
        experts, groups = architecture.num_experts, routing.groups
        if candidate.sparsity is not None:
            keep = kept_count(experts, candidate.sparsity, groups)
        else:
            (target,) = parse_targets(None, str(candidate.keep), experts, groups)
            keep = target.keep
        check_routing(keep, routing.experts_per_token, groups, routing.topk_groups)
        return keep

    def _label(self, candidate: Candidate, keep: int) -> str:
        choice = candidate.choice
        parts = [choice.method, f"keep {keep}"]
        if choice.method == "random":
            parts.insert(1, f"seed {choice.seed}")
        if choice.source_weights:
            parts += [f"{source}={weight:g}" for source, weight in choice.source_weights]
        if choice.protect != "none":
            parts.append(f"protect {choice.protect}")
        if self._names_files:
            parts.append(f"by {candidate.scores.name}")
        return " ".join(parts)
