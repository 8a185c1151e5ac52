"""The package's own jobs as the study calls them: score, choose, write, evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from quality.figures import Kept
from quality.study import DOMAINS, FOLDS, ROW_TOKENS, Study, label
from reap_stream.compaction import compact
from reap_stream.evaluating import evaluate
from reap_stream.pipeline import observe
from reap_stream.scoring.choosing import Chooser, open_chooser
from reap_stream.scoring.saliency import Scores
from reap_stream.scoring.selection import kept_count
from reap_stream.settings import (
    Candidate,
    ChoiceSettings,
    EvalSettings,
    OutputSettings,
    RunSettings,
)

REFERENCE = "original"
# float32 throughout: on so small a model rounding would be as large as what is measured.
COMPUTE_DTYPE = "float32"


def run_settings(model: Path, specs: Sequence[str], **others: Any) -> RunSettings:
    """How calibration text is run."""
    return RunSettings(
        model=model,
        calibration=tuple(specs),
        samples=None,
        sequence_length=ROW_TOKENS,
        compute_dtype=COMPUTE_DTYPE,
        device="cpu",
        progress=False,
        **others,
    )


def observed(study: Study, name: str, specs: Sequence[str], model: Path | None = None) -> Path:
    """The scores of a model on calibration text, taken once."""
    path = study.scratch / f"{name}.safetensors"
    if not path.exists():
        observe(run_settings(model or study.model, specs), path, overwrite=True)
    return path


def mixed_scores(study: Study) -> Path:
    """Scores on all domains, as many tokens of each, kept apart in one file."""
    return observed(study, "scores-domains", study.calibration())


def keep_at(study: Study, sparsity: str) -> int:
    """Experts that stay at a sparsity."""
    groups = study.opened.architecture.routing.groups
    return kept_count(study.num_experts, sparsity, groups)


def output_settings(directory: Path, keep: int | None, **others: Any) -> OutputSettings:
    """How a checkpoint is written; what a stopped run left of it gives way."""
    return OutputSettings(output=directory, keep=str(keep), overwrite=True, **others)


def written(
    study: Study, pruning: Candidate, *, model: Path | None = None, weights: str = "keep"
) -> Path:
    """A pruned checkpoint, written once, in a directory of its label."""
    directory = study.scratch / "models" / pruning.label
    if not directory.exists():
        directory.parent.mkdir(exist_ok=True)
        output = output_settings(directory, pruning.keep, weights=weights)
        compact(model or study.model, pruning.scores, pruning.choice, output)
    return directory


def candidate(
    scores: Path, keep: int, choice: ChoiceSettings | None = None, *, name: str
) -> Candidate:
    """A pruning, to be evaluated as it is or to be written."""
    return Candidate(scores=scores, keep=keep, choice=choice or ChoiceSettings(), label=name)


def compared(
    study: Study, candidates: Sequence[Candidate] = (), models: Sequence[Path] = ()
) -> dict[str, Any]:
    """What candidates lose on held-out text, in one reading of the model.

    Args:
        study: where the model and the text are.
        candidates: prunings of the first model that were never written.
        models: the reference first; by default the study's model alone.

    Returns:
        Label → figures; the reference is `REFERENCE`, other models have their directory's name.
    """
    chosen = tuple(models) or (study.model,)
    settings = EvalSettings(
        models=chosen,
        text=study.held_out(),
        candidates=tuple(candidates),
        samples=None,
        sequence_length=ROW_TOKENS,
        compute_dtype=COMPUTE_DTYPE,
        device="cpu",
        progress=False,
    )
    entries = evaluate(settings).document()["candidates"]
    names = [REFERENCE, *(m.name for m in chosen[1:]), *(c.label for c in candidates)]
    return {name: _figures(entry) for name, entry in zip(names, entries, strict=True)}


def _figures(entry: dict[str, Any]) -> dict[str, Any]:
    """Figures over all text, of each domain, and of each fold: those of domains count alike."""
    sources = {label(spec): values for spec, values in entry["sources"].items()}
    domains = {}
    for domain in DOMAINS:
        folds = [sources[f"held-out-{domain}-{fold}"] for fold in range(FOLDS)]
        means = {key: fmean(f[key] for f in folds) for key in ("loss", "kl", "top1_agreement")}
        domains[domain] = {**means, "folds": [fold["loss"] for fold in folds]}
    folds_of_all = zip(*(domains[domain]["folds"] for domain in DOMAINS), strict=True)
    layers = {str(layer["layer"]): layer["relative_error"] for layer in entry["layers"]}
    return {
        **entry["all"],
        "domains": domains,
        "folds": [fmean(losses) for losses in folds_of_all],
        "relative_error": layers,
    }


def chooser_of(study: Study, scores: Scores, choice: ChoiceSettings | None = None) -> Chooser:
    """Chooses experts as every job does."""
    architecture = study.opened.architecture
    return open_chooser(
        scores.layers,
        scores.sources,
        choice or ChoiceSettings(),
        groups=architecture.routing.groups,
        num_layers=architecture.num_layers,
    )


def kept_sets(
    study: Study, scores: Scores, keep: int, choice: ChoiceSettings | None = None
) -> Kept:
    """What a choice keeps in every layer."""
    chooser = chooser_of(study, scores, choice)
    return {layer: chooser.choose(layer, stats, keep) for layer, stats in scores.layers.items()}
