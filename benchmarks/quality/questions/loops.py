"""How often greedy continuations of held-out text run into a loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from quality.figures import mean_and_error, sign_test, wilson
from quality.loop_detector import distinct_share, loop_period, until_end
from quality.measuring import candidate, keep_at, mixed_scores, written
from quality.study import DOMAINS, Study, Tokens
from quality.tables import listed, percent, plus_minus, table
from reap_stream.settings import ChoiceSettings

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 200, 64, 128
SPARSITIES = ("0.25", "0.4", "0.5")
RANDOM_SPARSITY, SEEDS = "0.5", tuple(range(5))
ORIGINAL, TEXT = "original", "held-out text"


def measure(study: Study) -> dict[str, Any]:
    """Prompts are continued by checkpoints that transformers loads; the text's own end beside."""
    rows, domains = prompts(study)
    end = int(study.opened.checkpoint.config["eos_token_id"])
    found = {TEXT: judged(rows[:, PROMPT_TOKENS:], end)}
    for name, model in _models(study).items():
        found[name] = judged(continued(model, rows[:, :PROMPT_TOKENS]), end)
    return {"domains": domains, "new_tokens": NEW_TOKENS, "candidates": found}


def prompts(study: Study) -> tuple[Tokens, list[str]]:
    """Held-out rows [prompts, prompt + continuation], the domains in turn, and their domains."""
    width = PROMPT_TOKENS + NEW_TOKENS
    by_domain = {d: study.windows(d, "held-out", width) for d in DOMAINS}
    domains = [DOMAINS[i % len(DOMAINS)] for i in range(PROMPTS)]
    rows = [by_domain[d][i // len(DOMAINS)] for i, d in enumerate(domains)]
    return np.stack(rows), domains


def continued(model: Path, rows: Tokens) -> Tokens:
    """Greedy continuations [prompts, at most NEW_TOKENS]; what follows an end is padding."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.from_numpy(rows)
    with torch.inference_mode():
        out = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
        )
    tokens: Tokens = out[:, rows.shape[1] :].numpy()
    return tokens


def judged(rows: Tokens, end: int) -> dict[str, list[Any]]:
    """Of each continuation: whether it ended, the period it loops with (0: none), its variety."""
    cut = [until_end(row.tolist(), end) for row in rows]
    return {
        "ended": [ended for _, ended in cut],
        "period": [0 if ended else loop_period(tokens) for tokens, ended in cut],
        "distinct": [distinct_share(tokens) for tokens, _ in cut],
    }


def fields(result: dict[str, Any]) -> dict[str, str]:
    """A table of rates with intervals, and one by domain."""
    found = result["candidates"]
    groups = {TEXT: [TEXT], ORIGINAL: [ORIGINAL]}
    groups |= {f"REAP, {percent(float(s))}": [f"reap {s}"] for s in SPARSITIES}
    chance = f"random, {percent(float(RANDOM_SPARSITY))}, {len(SEEDS)} draws"
    groups[chance] = [f"random-{seed}" for seed in SEEDS]
    head = [
        "continued by",
        "n",
        "loops",
        "rate",
        "95 % interval",
        "ended",
        "distinct 4-grams",
        "begun / ceased",
    ]
    rows = [
        [name, *_cells([found[part] for part in parts]), _changes_cell(found, parts)]
        for name, parts in groups.items()
    ]
    by_domain = [
        [name, *(_domain_rate(result, parts, domain) for domain in DOMAINS)]
        for name, parts in groups.items()
    ]
    return {
        "table": table(head, rows),
        "domains": table(["loop rate", *DOMAINS], by_domain),
        "prompts": str(len(result["domains"])),
        "verdict": _verdict(found),
    }


def _cells(parts: list[dict[str, Any]]) -> list[str]:
    periods = [period for part in parts for period in part["period"]]
    ended = [e for part in parts for e in part["ended"]]
    distinct = [share for part in parts for share in part["distinct"]]
    hits = sum(period > 0 for period in periods)
    low, high = wilson(hits, len(periods))
    return [
        str(len(periods)),
        str(hits),
        percent(hits / len(periods)),
        f"{percent(low)} to {percent(high)}",
        percent(sum(ended) / len(ended)),
        plus_minus(mean_and_error(distinct)),
    ]


def _changes(found: dict[str, Any], parts: list[str]) -> tuple[int, int]:
    """How many continuations loop where the unpruned model's do not, and the reverse."""
    pairs = [
        (before > 0, after > 0)
        for part in parts
        for before, after in zip(found[ORIGINAL]["period"], found[part]["period"], strict=True)
    ]
    return pairs.count((False, True)), pairs.count((True, False))


def _changes_cell(found: dict[str, Any], parts: list[str]) -> str:
    if parts in ([TEXT], [ORIGINAL]):
        return ""
    begun, ceased = _changes(found, parts)
    return f"{begun} / {ceased}"


def _domain_rate(result: dict[str, Any], parts: list[str], domain: str) -> str:
    chosen = [i for i, d in enumerate(result["domains"]) if d == domain]
    hits = [result["candidates"][part]["period"][i] > 0 for part in parts for i in chosen]
    return percent(sum(hits) / len(hits))


def _verdict(found: dict[str, Any]) -> str:
    """Whether as many prompts begin to loop as cease to."""
    tests = [
        f"{sign_test(*_changes(found, [f'reap {s}'])):.2g} at {percent(float(s))}"
        for s in SPARSITIES
    ]
    return (
        "That as many prompts begin to loop as cease to, by chance alone, would give so uneven "
        f"counts for REAP with probability {listed(tests)} (McNemar's exact test)."
    )


def _models(study: Study) -> dict[str, Path]:
    """Checkpoints in bfloat16, which transformers runs without a GPU."""
    scores, whole = mixed_scores(study), study.num_experts
    half = keep_at(study, RANDOM_SPARSITY)
    wanted = {ORIGINAL: (whole, ChoiceSettings())}
    wanted |= {f"reap {s}": (keep_at(study, s), ChoiceSettings()) for s in SPARSITIES}
    for seed in SEEDS:
        wanted[f"random-{seed}"] = (half, ChoiceSettings(method="random", seed=seed))
    return {
        name: written(
            study,
            candidate(scores, keep, choice, name=f"loops-{name.replace(' ', '-')}"),
            weights="bf16",
        )
        for name, (keep, choice) in wanted.items()
    }
