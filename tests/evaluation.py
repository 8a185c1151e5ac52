"""What tests of the evaluation share: settings, made-up scores, and the oracle's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reap_stream.model.opened import open_model
from reap_stream.scoring.saliency import LayerStats, Scores
from reap_stream.scoring.scores_file import save_scores
from reap_stream.settings import EvalSettings
from tests.engine import BATCH_TOKENS

Array = np.ndarray[Any, Any]


def eval_settings(models: Sequence[Path], text: Sequence[str], **options: Any) -> EvalSettings:
    """Settings of a float32 evaluation in small batches on the CPU."""
    defaults: dict[str, Any] = {
        "batch_tokens": BATCH_TOKENS,
        "compute_dtype": "float32",
        "device": "cpu",
        "progress": False,
    }
    return EvalSettings(models=tuple(models), text=tuple(text), **{**defaults, **options})


def make_scores(model: Path, path: Path, seed: int = 0) -> Path:
    """A file of scores that no run gave, of every layer with routed experts."""
    opened = open_model(model, dtype=torch.float32)
    num_experts = opened.architecture.num_experts
    rng = np.random.default_rng(seed)
    layers = {}
    for layer in (*opened.architecture.moe_layers, *opened.mtp_kept_layers()):
        stats = LayerStats.zeros(1, num_experts)
        stats.tokens[:] = rng.integers(1, 9, (1, num_experts))
        for sums in (stats.gate_sum, stats.norm_sum, stats.gate_norm_sum, stats.norm_max):
            sums[:] = rng.random((1, num_experts))
        layers[layer] = stats
    save_scores(path, Scores(layers, ("made up",), num_experts, opened.checkpoint.fingerprint))
    return path


@dataclass(frozen=True)
class Expected:
    """Figures by the formulas, in float64 from whole logits."""

    tokens: int
    loss: float
    kl: float
    top1_agreement: float


def expected_figures(
    rows: Sequence[Array], logits: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]
) -> Expected:
    """Loss, KL(reference || own) and agreement over the predicted tokens of some rows.

    Args:
        rows: token ids of each row.
        logits: of each row, [1, tokens, vocabulary] or without the first.
        reference: the same of the reference.
    """
    losses, divergences, agreed = [], [], []
    for row, own_logits, reference_logits in zip(rows, logits, reference, strict=True):
        own, theirs = (
            torch.log_softmax(found.reshape(len(row), -1)[:-1].double(), -1)
            for found in (own_logits, reference_logits)
        )
        losses.append(-own[torch.arange(len(row) - 1), torch.from_numpy(row[1:])])
        divergences.append((theirs.exp() * (theirs - own)).sum(-1))
        agreed.append((own.argmax(-1) == theirs.argmax(-1)).double())
    loss, divergence, same = (torch.cat(found) for found in (losses, divergences, agreed))
    return Expected(len(loss), float(loss.mean()), float(divergence.mean()), float(same.mean()))


def relative_errors(
    states: Sequence[Sequence[torch.Tensor]], reference: Sequence[Sequence[torch.Tensor]]
) -> list[float]:
    """Of each layer, ||own - reference|| / ||reference|| over all tokens of all rows."""
    found = []
    for own, theirs in zip(states, reference, strict=True):
        apart = sum(
            float((a.double() - b.double()).square().sum())
            for a, b in zip(own, theirs, strict=True)
        )
        whole = sum(float(b.double().square().sum()) for b in theirs)
        found.append((apart / whole) ** 0.5)
    return found
