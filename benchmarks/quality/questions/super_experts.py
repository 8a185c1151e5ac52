"""Which experts arXiv 2507.23279 calls super, whether REAP keeps them, and what losing them costs.

A made-up scores file says which single expert goes from every layer: the one that REAP would drop
first, except in one layer, where it is the expert in question or another one drawn by chance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from quality.figures import Kept, mean_and_deviation, paired
from quality.measuring import (
    REFERENCE,
    candidate,
    chooser_of,
    compared,
    keep_at,
    kept_sets,
    mixed_scores,
)
from quality.study import SEED, Study
from quality.tables import listed, percent, plus_minus, table
from reap_stream.scoring.saliency import LayerStats, Scores
from reap_stream.scoring.scores_file import load_scores, save_scores
from reap_stream.settings import Candidate, ChoiceSettings

SPARSITIES = ("0.25", "0.5", "0.625")
RANDOM_AT, SEEDS = "0.5", tuple(range(5))
OTHERS = 10
LARGEST_SHOWN = 6
NOTHING_FOUND = "So `--protect super` protects nothing here and changes no choice."
PROTECTING = ChoiceSettings(protect="super")

Removed = dict[int, int]
Place = tuple[int, int]


def measure(study: Study) -> dict[str, Any]:
    """Finds them, removes them on purpose, and protects them."""
    path = mixed_scores(study)
    scores = load_scores(path)
    protected = chooser_of(study, scores, PROTECTING).protected or {}
    found = [(layer, expert) for layer, experts in protected.items() for expert in experts]
    tested = _tested(study, scores, found)
    candidates = [
        candidate(_removing(study, scores, name, removed), study.num_experts - 1, name=name)
        for name, removed in _removals(study, scores, tested).items()
    ]
    if found:
        candidates += _protecting(study, path)
    return {
        "found": found,
        "tested": tested,
        "layers": study.opened.architecture.num_layers,
        "largest": _largest(study, scores),
        "median": float(np.median(np.concatenate(list(_maxima(scores).values())))),
        "changed": {s: _changed(study, scores, s) for s in SPARSITIES},
        "candidates": compared(study, candidates),
    }


def _tested(study: Study, scores: Scores, found: list[Place]) -> list[Place]:
    """The super experts, or who comes nearest, and the expert with the largest output of all."""
    ranked = _by_output(scores)
    counted = 3 * study.opened.architecture.num_layers
    nearest = next(place for place in ranked if 4 * place[0] < counted)
    return list(dict.fromkeys([*(found or [nearest]), ranked[0]]))


def _by_output(scores: Scores) -> list[Place]:
    """All experts, those with the largest outputs first."""
    maxima = _maxima(scores)
    places = [(layer, expert) for layer in maxima for expert in range(scores.num_experts)]
    return sorted(places, key=lambda place: -maxima[place[0]][place[1]])


def _protecting(study: Study, path: Path) -> list[Candidate]:
    """REAP and chance, with super experts protected and without."""
    candidates = []
    for protect in ("none", "super"):
        for s in SPARSITIES:
            choice = ChoiceSettings(protect=protect)
            candidates.append(candidate(path, keep_at(study, s), choice, name=f"{protect} {s}"))
        for seed in SEEDS:
            choice = ChoiceSettings(method="random", seed=seed, protect=protect)
            name = f"random-{seed} {protect}"
            candidates.append(candidate(path, keep_at(study, RANDOM_AT), choice, name=name))
    return candidates


def _maxima(scores: Scores) -> dict[int, np.ndarray[Any, np.dtype[np.float64]]]:
    """Largest |element| of each expert's outputs over all sources, [experts] a layer."""
    found = {}
    for layer, stats in scores.layers.items():
        assert stats.output_max is not None
        found[layer] = stats.output_max.max(axis=0)
    return found


def _largest(study: Study, scores: Scores) -> list[dict[str, Any]]:
    """The experts with the largest outputs, how REAP ranks them, and where it keeps them."""
    chooser = chooser_of(study, scores)
    maxima = _maxima(scores)
    kept = {s: kept_sets(study, scores, keep_at(study, s)) for s in SPARSITIES}
    entries = []
    for layer, expert in _by_output(scores)[:LARGEST_SHOWN]:
        own = chooser.scores(layer, scores.layers[layer])
        entries.append(
            {
                "layer": layer,
                "expert": expert,
                "output_max": float(maxima[layer][expert]),
                "rank": 1 + int((own > own[expert]).sum()),
                "kept": [s for s in SPARSITIES if expert in kept[s][layer]],
            }
        )
    return entries


def _removals(study: Study, scores: Scores, tested: list[Place]) -> dict[str, Removed]:
    """Which expert goes from every layer: REAP's lowest, but for one layer."""
    kept = kept_sets(study, scores, study.num_experts - 1)
    every = range(study.num_experts)
    lowest = {layer: next(e for e in every if e not in experts) for layer, experts in kept.items()}
    removals = {"lowest": lowest}
    for layer, expert in tested:
        removals[_name(layer, expert)] = {**lowest, layer: expert}
        others = [e for e in every if e != expert]
        draw = np.random.default_rng([SEED, layer, expert]).permutation(others)[:OTHERS]
        for turn, other in enumerate(draw):
            removals[_name(layer, expert, turn)] = {**lowest, layer: int(other)}
    return removals


def _name(layer: int, expert: int, turn: int | None = None) -> str:
    return f"{layer}-{expert}" + ("" if turn is None else f"-other-{turn}")


def _removing(study: Study, scores: Scores, name: str, removed: Removed) -> Path:
    """A scores file in which all experts are alike but for one a layer, which is lower."""
    layers = {}
    for layer, expert in removed.items():
        stats = LayerStats.zeros(1, study.num_experts)
        stats.tokens += 1
        stats.gate_norm_sum += 1.0
        stats.gate_norm_sum[0, expert] = 0.0
        layers[layer] = stats
    path = study.scratch / f"removing-{name}.safetensors"
    save_scores(path, Scores(layers, (name,), study.num_experts, scores.model_fingerprint))
    return path


def _changed(study: Study, scores: Scores, sparsity: str) -> int:
    """How many kept experts differ when super experts are protected."""
    keep = keep_at(study, sparsity)
    plain: Kept = kept_sets(study, scores, keep)
    protected = kept_sets(study, scores, keep, PROTECTING)
    return sum(len(set(protected[layer]) - set(plain[layer])) for layer in plain)


def fields(result: dict[str, Any]) -> dict[str, str]:
    """The experts, a table of the largest outputs, and the costs."""
    found = [f"expert {expert} of layer {layer}" for layer, expert in result["found"]]
    layers = result["layers"]
    return {
        "found": listed(found) if found else "none",
        "layers": f"of {layers} layers, 0 to {(3 * layers - 1) // 4}",
        "median": f"{result['median']:.2f}",
        "largest": _largest_table(result),
        "cost": _cost_table(result),
        "base": f"{result['candidates']['lowest']['loss']:.4f}",
        "original": f"{result['candidates'][REFERENCE]['loss']:.4f}",
        "others": str(OTHERS),
        "protect": _protect_table(result) if found else NOTHING_FOUND,
    }


def _largest_table(result: dict[str, Any]) -> str:
    supers = {tuple(place) for place in result["found"]}
    rows = [
        [
            str(entry["layer"]),
            str(entry["expert"]),
            f"{entry['output_max']:.2f}",
            f"{entry['output_max'] / result['median']:.1f}",
            str(entry["rank"]),
            ", ".join(percent(float(s)) for s in entry["kept"]) or "none",
            "yes" if (entry["layer"], entry["expert"]) in supers else "",
        ]
        for entry in result["largest"]
    ]
    head = ["layer", "expert", "largest output", "÷ median", "REAP's rank in its layer"]
    return table([*head, "kept by REAP at", "super"], rows)


def _cost_table(result: dict[str, Any]) -> str:
    found, supers = result["candidates"], {tuple(place) for place in result["found"]}
    base = found["lowest"]
    rows = []
    for layer, expert in result["tested"]:
        own = paired(base, found[_name(layer, expert)])
        others = [paired(base, found[_name(layer, expert, turn)])[0] for turn in range(OTHERS)]
        rows.append(
            [
                f"expert {expert} of layer {layer}" + ("" if (layer, expert) in supers else " *"),
                plus_minus(own, 4, signed=True),
                plus_minus(mean_and_deviation(others), 4, signed=True),
                f"{min(others):+.4f} to {max(others):+.4f}",
                f"{sum(other >= own[0] for other in others)} of {OTHERS}",
            ]
        )
    head = ["dropped", "costs", "another of its layer costs", "range", "others that cost as much"]
    return table(head, rows)


def _protect_table(result: dict[str, Any]) -> str:
    found = result["candidates"]
    rows = [
        [
            f"REAP, {percent(float(s))}",
            f"{found[f'none {s}']['loss']:.4f}",
            f"{found[f'super {s}']['loss']:.4f}",
            str(result["changed"][s]),
        ]
        for s in SPARSITIES
    ]
    losses = [[found[f"random-{x} {p}"]["loss"] for x in SEEDS] for p in ("none", "super")]
    gaps = [paired(found[f"random-{x} none"], found[f"random-{x} super"])[0] for x in SEEDS]
    cells = [plus_minus(mean_and_deviation(part), 4) for part in losses]
    change = plus_minus(mean_and_deviation(gaps), 4, signed=True)
    last = [f"random, {percent(float(RANDOM_AT))}, {len(SEEDS)} draws", *cells, f"loss {change}"]
    head = ["choice", "loss, `--protect none`", "loss, `--protect super`", "experts changed"]
    return table(head, [*rows, last])
