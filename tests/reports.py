"""Scores and records of made-up runs, as reports read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reap_stream.scoring.saliency import SUMS, LayerStats, Scores, Sums
from reap_stream.scoring.scores_file import save_scores

SOURCES = ("code.jsonl:512", "prose.jsonl:256", "tools.jsonl")


def make_scores(
    layers: Sequence[int], num_experts: int, sources: Sequence[str] = SOURCES, seed: int = 0
) -> Scores:
    """Scores in which a third of the experts prefer each source and a few see no token."""
    rng = np.random.default_rng(seed)
    made = {layer: _layer(rng, num_experts, len(sources)) for layer in layers}
    return Scores(made, tuple(sources), num_experts, "f" * 64, {"tokens": "123456"})


def _layer(rng: np.random.Generator, num_experts: int, num_sources: int) -> LayerStats:
    wanted = rng.lognormal(5.0, 0.8, (num_sources, num_experts))
    wanted *= np.where(
        np.arange(num_experts) % num_sources == np.arange(num_sources)[:, None], 4, 1
    )
    tokens = rng.poisson(wanted).astype(np.int64)
    tokens[:, rng.random(num_experts) < 0.02] = 0
    gate = rng.gamma(4.0, 0.05, num_experts)
    norm = rng.lognormal(0.0, 0.5, num_experts) * rng.uniform(1, 3)
    odd_tokens = rng.binomial(tokens, 0.5).astype(np.int64)
    whole, odd = (
        {
            "tokens": counts,
            "gate_sum": counts * gate,
            "norm_sum": counts * norm,
            "gate_norm_sum": counts
            * gate
            * norm
            * rng.uniform(0.7, 1.3, (num_sources, num_experts)),
        }
        for counts in (tokens, odd_tokens)
    )
    assert whole.keys() == SUMS.keys()
    largest = np.where(tokens > 0, norm * 1.5, 0.0)
    return LayerStats(**whole, norm_max=largest, output_max=largest / 2, odd=Sums(**odd))


def write_pruned(
    directory: Path, scores: Scores, kept: Mapping[int, Sequence[int]], **run: Any
) -> Path:
    """The records of a pruned checkpoint, without its weights."""
    records = directory / "reap"
    records.mkdir(parents=True)
    save_scores(records / "scores.safetensors", scores)
    document = {
        "num_experts": scores.num_experts,
        "kept": {str(layer): list(map(int, experts)) for layer, experts in kept.items()},
    }
    (records / "kept_experts.json").write_text(json.dumps(document), encoding="utf-8")
    details = {
        "settings": {"model": "org/Big-MoE", "method": "reap", "seed": 0},
        "source": {"path": "/models/Big-MoE", "architecture": "BigMoeForCausalLM"},
        "calibration": {"rows": 768, "tokens": 123456, "notes": ["a note of the run"]},
        "memory": {"budget_nbytes": 16 * 2**30},
        "seconds": 3723.4,
        "read_nbytes": 354_000_000_000,
        "written_nbytes": 221_000_000_000,
        "peak_resident_nbytes": int(9.1 * 2**30),
        **run,
    }
    (records / "run.json").write_text(json.dumps(details), encoding="utf-8")
    return directory


def write_evaluation(path: Path, candidates: Sequence[tuple[str, str, int, float]]) -> Path:
    """An evaluation of (label, criterion, kept experts, loss)."""
    entries = [
        {
            "label": label,
            "keep": keep,
            **({"method": method} if method else {}),
            "all": {
                "tokens": 5000,
                "loss": loss,
                "perplexity": float(np.exp(loss)),
                "kl": 0.1 * number,
                "top1_agreement": 1 - 0.05 * number,
            },
            "sources": {},
            "layers": [{"layer": i, "relative_error": 0.01 * number * i} for i in range(4)],
        }
        for number, (label, method, keep, loss) in enumerate(candidates)
    ]
    document = {"format_version": 1, "candidates": entries}
    path.write_text(json.dumps(document), encoding="utf-8")
    return path
