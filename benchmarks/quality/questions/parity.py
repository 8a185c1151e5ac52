"""The streamed evaluation against transformers' own model, on the same candidates.

In transformers a removed expert is one that the router may not choose: its correction bias is minus
infinity. So the whole model runs, no checkpoint of ours is read, and pruned losses must agree.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from quality.figures import Kept
from quality.measuring import REFERENCE, candidate, compared, keep_at, kept_sets, observed
from quality.study import Study
from quality.tables import table
from reap_stream.scoring.scores_file import load_scores

SPARSITIES = ("0.25", "0.5")
ROWS_AT_ONCE = 4


def measure(study: Study) -> dict[str, Any]:
    """Losses of the bfloat16 model, whole and pruned, by both."""
    if study.bf16 is None:
        sys.exit("transformers runs the bfloat16 model: give --bf16")
    scores = observed(study, "scores-bf16", study.calibration(), study.bf16)
    names = {f"reap {s}": keep_at(study, s) for s in SPARSITIES}
    candidates = [candidate(scores, keep, name=name) for name, keep in names.items()]
    ours = compared(study, candidates, (study.bf16,))
    model = AutoModelForCausalLM.from_pretrained(study.bf16, dtype=torch.float32).eval()
    theirs = {REFERENCE: by_transformers(model, model, study)}
    for name, keep in names.items():
        pruned = copy.deepcopy(model)
        with_removed(pruned, kept_sets(study, load_scores(scores), keep))
        theirs[name] = by_transformers(model, pruned, study)
    return {"ours": {n: [ours[n]["loss"], ours[n]["kl"]] for n in theirs}, "theirs": theirs}


@torch.inference_mode()
def by_transformers(reference: Any, model: Any, study: Study) -> tuple[float, float]:
    """Mean loss of a model on all held-out rows, and mean KL(reference || model)."""
    rows = torch.from_numpy(np.concatenate([np.load(spec) for spec in study.held_out()]))
    loss = divergence = 0.0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        expected, found = (m(part).logits[:, :-1].log_softmax(-1) for m in (reference, model))
        loss -= float(found.gather(-1, part[:, 1:, None]).sum(dtype=torch.float64))
        divergence += float(functional.kl_div(found, expected, log_target=True, reduction="sum"))
    predicted = rows[:, 1:].numel()
    return loss / predicted, divergence / predicted


def with_removed(model: Any, kept: Kept) -> None:
    """Lets each router choose kept experts alone."""
    for layer, experts in kept.items():
        bias = model.model.layers[layer].mlp.gate.e_score_correction_bias
        removed = torch.ones_like(bias, dtype=torch.bool)
        removed[list(experts)] = False
        bias.masked_fill_(removed, float("-inf"))


def fields(result: dict[str, Any]) -> dict[str, str]:
    """A table of both."""
    lines = [
        [name, *(f"{x:.6f}" for x in (*result["ours"][name], *result["theirs"][name]))]
        for name in result["ours"]
    ]
    head = ["candidate", "loss", "KL", "loss, transformers", "KL, transformers"]
    gaps = [
        abs(ours - theirs)
        for name in result["ours"]
        for ours, theirs in zip(result["ours"][name], result["theirs"][name], strict=True)
    ]
    return {"table": table(head, lines), "largest": f"{max(gaps):.0e}"}
