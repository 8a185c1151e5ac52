"""Whether later layers should be scored on the whole model's activations or the pruned one's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quality.figures import Kept, overlap, paired
from quality.measuring import (
    REFERENCE,
    candidate,
    compared,
    keep_at,
    kept_sets,
    mixed_scores,
    output_settings,
    run_settings,
)
from quality.study import Study
from quality.tables import listed, percent, plus_minus, table
from reap_stream.pipeline import prune
from reap_stream.scoring.scores_file import load_scores

SPARSITIES = ("0.25", "0.5")
CHOICES = ("original", "pruned")


def measure(study: Study) -> dict[str, Any]:
    """`original` is what the mix's scores choose; `pruned` takes a pass for each sparsity."""
    path = mixed_scores(study)
    scores = load_scores(path)
    models, candidates, overlaps = [], [], {}
    for sparsity in SPARSITIES:
        keep = keep_at(study, sparsity)
        models.append(_pruned(study, sparsity))
        candidates.append(candidate(path, keep, name=f"propagated-original-{sparsity}"))
        kept = kept_sets(study, scores, keep), _kept(models[-1])
        layers = {str(i): overlap({i: kept[0][i]}, {i: kept[1][i]}) for i in kept[0]}
        overlaps[sparsity] = {"all": overlap(*kept), **layers}
    found = compared(study, candidates, (study.model, *models))
    return {"overlaps": overlaps, "candidates": found}


def fields(result: dict[str, Any]) -> dict[str, str]:
    """One table; which choice lost less."""
    rows = [["(unpruned)", "", *_cells(result, REFERENCE), ""]]
    for sparsity in SPARSITIES:
        shared = result["overlaps"][sparsity]
        for choice in CHOICES:
            note = percent(shared["all"]) if choice == "pruned" else ""
            cells = _cells(result, f"propagated-{choice}-{sparsity}")
            rows.append([percent(float(sparsity)), f"`{choice}`", *cells, note])
    head = ["sparsity", "`--propagate`", "loss", "KL", "kept as with `original`"]
    return {"table": table(head, rows), "verdict": _verdict(result)}


def _pruned(study: Study, sparsity: str) -> Path:
    directory = study.scratch / "models" / f"propagated-pruned-{sparsity}"
    if not directory.exists():
        directory.parent.mkdir(exist_ok=True)
        run = run_settings(study.model, study.calibration(), propagate="pruned")
        prune(run, output_settings(directory, keep_at(study, sparsity)))
    return directory


def _kept(model: Path) -> Kept:
    document = json.loads((model / "reap" / "kept_experts.json").read_text())
    return {int(layer): kept for layer, kept in document["kept"].items()}


def _cells(result: dict[str, Any], name: str) -> list[str]:
    entry = result["candidates"][name]
    return [f"{entry['loss']:.3f}", f"{entry['kl']:.3f}"]


def _verdict(result: dict[str, Any]) -> str:
    found = result["candidates"]
    gaps = [
        f"{plus_minus(_gap(found, sparsity), 4, signed=True)} nats at {percent(float(sparsity))}"
        for sparsity in SPARSITIES
    ]
    return f"The loss with `pruned` minus that with `original` is {listed(gaps)}."


def _gap(found: dict[str, Any], sparsity: str) -> tuple[float, float]:
    original, pruned = (found[f"propagated-{choice}-{sparsity}"] for choice in CHOICES)
    return paired(original, pruned)
