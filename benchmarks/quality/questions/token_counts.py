"""How many calibration tokens are enough: kept sets and loss from a thousand routed tokens on.

Routed tokens are (token, expert) pairs of one layer: calibration tokens × experts a token is sent
to. The text is divided into REPLICATES that share nothing, each into pieces such that the first k
pieces of a replicate are a run of the k-th size; one observation with the pieces kept apart holds
all runs, and source weights pick one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from quality.figures import mean_and_deviation, overlap
from quality.measuring import (
    REFERENCE,
    candidate,
    chooser_of,
    compared,
    keep_at,
    kept_sets,
    observed,
)
from quality.study import DOMAINS, SEED, Study
from quality.tables import listed, percent, plus_minus, table
from reap_stream.scoring.agreement import split_half
from reap_stream.scoring.saliency import Scores
from reap_stream.scoring.scores_file import load_scores
from reap_stream.settings import ChoiceSettings

ROW_TOKENS = 128
REPLICATES = 4
# Rows of the runs of each size: 256 tokens (1,024 routed, with 4 experts a token) to 65,536.
ROWS = (2, 8, 32, 128, 512)
SPARSITIES = ("0.25", "0.5")
LOSS_AT = "0.5"
SHARE_OF_COST = 0.1


def measure(study: Study) -> dict[str, Any]:
    """One observation of all pieces, and one reading of the model for the losses."""
    specs = _pieces(study)
    path = observed(study, "scores-pieces", [s for pieces in specs for s in pieces])
    scores = load_scores(path)
    every = ChoiceSettings()
    candidates = [candidate(path, keep_at(study, LOSS_AT), every, name="all")]
    sizes = []
    for place, rows in enumerate(ROWS):
        chosen = [_only(specs, [(r, place + 1)]) for r in range(REPLICATES)]
        names = [f"{rows}-{replicate}" for replicate in range(REPLICATES)]
        candidates += [
            candidate(path, keep_at(study, LOSS_AT), choice, name=name)
            for name, choice in zip(names, chosen, strict=True)
        ]
        sizes.append({"rows": rows, "agreements": _agreements(study, scores, specs, place + 1)})
    per_token = study.opened.architecture.routing.experts_per_token
    return {
        "experts": study.num_experts,
        "routed_per_row": ROW_TOKENS * per_token,
        "sizes": sizes,
        "chance": {s: keep_at(study, s) / study.num_experts for s in SPARSITIES},
        "all_halves": {s: _halves(study, scores, keep_at(study, s), every) for s in SPARSITIES},
        "candidates": compared(study, candidates),
    }


def _pieces(study: Study) -> list[list[str]]:
    """SPECs of the pieces of each replicate: rows of all domains in an order drawn by chance."""
    share = -(-REPLICATES * ROWS[-1] // len(DOMAINS))
    pool = np.concatenate([study.windows(d, "train", ROW_TOKENS)[:share] for d in DOMAINS])
    pool = np.random.default_rng([SEED, REPLICATES]).permutation(pool)
    specs = []
    for replicate in range(REPLICATES):
        rows = pool[replicate * ROWS[-1] :][: ROWS[-1]]
        bounds = [0, *ROWS]
        specs.append(
            [
                study.save_rows(f"piece-{replicate}-{place}", rows[start:stop])
                for place, (start, stop) in enumerate(pairwise(bounds))
            ]
        )
    return specs


def _only(specs: list[list[str]], taken: Sequence[tuple[int, int]]) -> ChoiceSettings:
    """The choice from the first pieces of some replicates: (replicate, pieces) pairs."""
    counted = dict(taken)
    weights = tuple(
        (spec, float(place < counted.get(replicate, 0)))
        for replicate, pieces in enumerate(specs)
        for place, spec in enumerate(pieces)
    )
    return ChoiceSettings(source_weights=weights)


def _agreements(
    study: Study, scores: Scores, specs: list[list[str]], pieces: int
) -> dict[str, dict[str, list[float]]]:
    """Of each sparsity and run: overlap with a run on all other text, and split-half agreement."""
    found: dict[str, dict[str, list[float]]] = {}
    for sparsity in SPARSITIES:
        keep = keep_at(study, sparsity)
        own = [_only(specs, [(r, pieces)]) for r in range(REPLICATES)]
        rest = [
            _only(specs, [(o, len(ROWS)) for o in range(REPLICATES) if o != r])
            for r in range(REPLICATES)
        ]
        found[sparsity] = {
            "rest": [
                overlap(kept_sets(study, scores, keep, a), kept_sets(study, scores, keep, b))
                for a, b in zip(own, rest, strict=True)
            ],
            "halves": [_halves(study, scores, keep, choice) for choice in own],
        }
    return found


def _halves(study: Study, scores: Scores, keep: int, choice: ChoiceSettings) -> float:
    return split_half(chooser_of(study, scores, choice), scores.layers, keep).mean


def fields(result: dict[str, Any]) -> dict[str, str]:
    """One table over sizes, and the figures of the text around it."""
    found = result["candidates"]
    whole = REPLICATES * ROWS[-1] * result["routed_per_row"]
    rows = [_row(result, size) for size in result["sizes"]]
    halves = [percent(result["all_halves"][s]) for s in SPARSITIES]
    blank = [""] * len(SPARSITIES)
    last = [
        *_counts(result, REPLICATES * ROWS[-1]),
        "1",
        *blank,
        *halves,
        f"{found['all']['loss']:.3f}",
    ]
    heads = [
        f"{kind}, {percent(float(s))}" for kind in ("with the rest", "halves") for s in SPARSITIES
    ]
    head = ["routed tokens", "an expert", "runs", *heads, f"loss at {percent(float(LOSS_AT))}"]
    chance = [f"{percent(share)} at {percent(float(s))}" for s, share in result["chance"].items()]
    return {
        "table": table(head, [*rows, last]),
        "others": f"{whole * (REPLICATES - 1) // REPLICATES:,}",
        "chance": listed(chance),
        "enough": _enough(result),
    }


def _row(result: dict[str, Any], size: dict[str, Any]) -> list[str]:
    cells = [
        f"{percent(mean_and_deviation(size['agreements'][s][kind])[0])} "
        f"({percent(min(size['agreements'][s][kind]))})"
        for kind in ("rest", "halves")
        for s in SPARSITIES
    ]
    losses = plus_minus(mean_and_deviation(_losses(result, size)))
    return [*_counts(result, size["rows"]), str(REPLICATES), *cells, losses]


def _counts(result: dict[str, Any], rows: int) -> list[str]:
    routed = rows * result["routed_per_row"]
    return [f"{routed:,}", f"{routed // result['experts']:,}"]


def _losses(result: dict[str, Any], size: dict[str, Any]) -> list[float]:
    names = [f"{size['rows']}-{replicate}" for replicate in range(REPLICATES)]
    return [result["candidates"][name]["loss"] for name in names]


def _enough(result: dict[str, Any]) -> str:
    """From which size on no run loses much more than all the text does."""
    found = result["candidates"]
    whole = found["all"]["loss"]
    cost = whole - found[REFERENCE]["loss"]
    enough: int | None = None
    for size in reversed(result["sizes"]):
        if max(_losses(result, size)) - whole > SHARE_OF_COST * cost:
            break
        enough = size["rows"] * result["routed_per_row"]
    share = f"{percent(SHARE_OF_COST)} of what pruning costs ({cost:.3f} nats)"
    if enough is None:
        return f"No size brought every run within {share} of all the text together."
    return (
        f"From {enough:,} routed tokens a layer on, which is {enough // result['experts']:,} an "
        f"expert, every run is within {share} of all the text together."
    )
