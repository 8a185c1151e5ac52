"""What an expert set costs on text of another kind than it was chosen on."""

from __future__ import annotations

from typing import Any

from quality.figures import overlap, paired
from quality.measuring import (
    REFERENCE,
    candidate,
    compared,
    keep_at,
    kept_sets,
    mixed_scores,
)
from quality.study import CALIBRATION_ROWS, DOMAINS, ROW_TOKENS, Study
from quality.tables import listed, percent, plus_minus, table
from reap_stream.scoring.scores_file import load_scores
from reap_stream.settings import ChoiceSettings

SPARSITIES = ("0.25", "0.5")
MIX = "mix"
TEXTS = (*DOMAINS, MIX)


def measure(study: Study) -> dict[str, Any]:
    """One observation with sources kept apart; the choice takes one of them or all."""
    path = mixed_scores(study)
    specs = dict(zip(DOMAINS, study.calibration(), strict=True))
    choices = {MIX: ChoiceSettings()}
    for domain in DOMAINS:
        weights = tuple((spec, float(spec == specs[domain])) for spec in specs.values())
        choices[domain] = ChoiceSettings(source_weights=weights)
    candidates = [
        candidate(path, keep_at(study, s), choices[text], name=f"{text} {s}")
        for s in SPARSITIES
        for text in TEXTS
    ]
    scores = load_scores(path)
    overlaps = {
        s: {
            text: overlap(
                kept_sets(study, scores, keep_at(study, s), choices[text]),
                kept_sets(study, scores, keep_at(study, s), choices[MIX]),
            )
            for text in DOMAINS
        }
        for s in SPARSITIES
    }
    return {
        "calibration_tokens": CALIBRATION_ROWS * ROW_TOKENS,
        "overlaps": overlaps,
        "candidates": compared(study, candidates),
    }


def fields(result: dict[str, Any]) -> dict[str, str]:
    """A table a sparsity, and what stands out in them."""
    tables = {f"loss_{_number(s)}": _table(result, s) for s in SPARSITIES}
    verdicts = {f"verdict_{_number(s)}": _verdict(result, s) for s in SPARSITIES}
    return {"tokens": f"{result['calibration_tokens']:,}", **tables, **verdicts}


def _number(sparsity: str) -> str:
    return f"{100 * float(sparsity):g}"


def _loss(result: dict[str, Any], name: str, domain: str) -> float:
    return float(result["candidates"][name]["domains"][domain]["loss"])


def _table(result: dict[str, Any], sparsity: str) -> str:
    head = ["calibrated on", *(f"loss on {d}" for d in DOMAINS), "mean", "kept as with the mix"]
    rows = [_row(result, REFERENCE, "(unpruned)", "")]
    for text in TEXTS:
        shared = result["overlaps"][sparsity].get(text)
        note = "" if shared is None else percent(shared)
        rows.append(_row(result, f"{text} {sparsity}", text, note))
    return table(head, rows)


def _row(result: dict[str, Any], name: str, shown: str, note: str) -> list[str]:
    losses = [_loss(result, name, domain) for domain in DOMAINS]
    return [shown, *(f"{loss:.3f}" for loss in (*losses, sum(losses) / len(losses))), note]


def _verdict(result: dict[str, Any], sparsity: str) -> str:
    """What calibration on a domain's own text saves, and what it costs elsewhere."""
    found = result["candidates"]
    mixed = found[f"{MIX} {sparsity}"]["domains"]
    own, away = [], []
    for text in DOMAINS:
        domains = found[f"{text} {sparsity}"]["domains"]
        own.append(plus_minus(paired(mixed[text], domains[text]), signed=True))
        away += [paired(mixed[d], domains[d])[0] for d in DOMAINS if d != text]
    mean = {text: found[f"{text} {sparsity}"]["loss"] for text in TEXTS}
    best = min(mean, key=mean.__getitem__)
    return (
        f"At {percent(float(sparsity))}, against the mix, calibrating on one domain alone changes "
        f"the loss on that domain by {listed(own)} ({listed(DOMAINS)}), and on the other two by "
        f"{min(away):+.3f} to {max(away):+.3f}. The lowest mean loss is that of {best}."
    )
