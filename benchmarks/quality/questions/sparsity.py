"""What each criterion loses at each sparsity, chance beside it."""

from __future__ import annotations

from typing import Any

from quality.figures import mean_and_deviation, paired
from quality.measuring import REFERENCE, candidate, compared, keep_at, mixed_scores
from quality.study import DOMAINS, Study
from quality.tables import listed, percent, plus_minus, table
from reap_stream.settings import ChoiceSettings

SPARSITIES = ("0.125", "0.25", "0.4", "0.5", "0.625")
METHODS = ("reap", "ean", "frequency", "gate")
SEEDS = tuple(range(5))
# The sparsity that losses are shown for by domain.
BY_DOMAIN = "0.5"


def measure(study: Study) -> dict[str, Any]:
    """Five sparsities, four criteria and five draws by chance, in one reading of the model."""
    scores = mixed_scores(study)
    choices = {method: ChoiceSettings(method=method) for method in METHODS}
    choices |= {f"random-{seed}": ChoiceSettings(method="random", seed=seed) for seed in SEEDS}
    candidates = [
        candidate(scores, keep_at(study, sparsity), choice, name=f"{name} {sparsity}")
        for sparsity in SPARSITIES
        for name, choice in choices.items()
    ]
    keeps = {sparsity: keep_at(study, sparsity) for sparsity in SPARSITIES}
    return {"keeps": keeps, "candidates": compared(study, candidates)}


def fields(result: dict[str, Any]) -> dict[str, str]:
    """Tables of loss and KL, of differences from REAP, and who was best."""
    found = result["candidates"]
    return {
        "original": f"{found[REFERENCE]['loss']:.3f}",
        "tokens": str(found[REFERENCE]["tokens"]),
        "kept": listed([f"{keep}" for keep in result["keeps"].values()]),
        "loss": _table(found, "loss"),
        "kl": _table(found, "kl"),
        "top1": _table(found, "top1_agreement"),
        "differences": _differences(found),
        "domains": _by_domain(found),
        "domains_verdict": _domains_verdict(found),
        "loss_verdict": _verdict(found, "loss"),
        "loss_led": _verdict(found, "loss").partition(" (")[0],
        "kl_verdict": _verdict(found, "kl"),
        "clear": _clear(found),
        "random": _against_chance(found),
        "growth": _growth(found),
    }


def _seeds(found: dict[str, Any], sparsity: str, key: str) -> list[float]:
    return [found[f"random-{seed} {sparsity}"][key] for seed in SEEDS]


def _table(found: dict[str, Any], key: str) -> str:
    head = ["criterion", *(percent(float(s)) for s in SPARSITIES)]
    rows = [[m, *(f"{found[f'{m} {s}'][key]:.3f}" for s in SPARSITIES)] for m in METHODS]
    chance = [plus_minus(mean_and_deviation(_seeds(found, s, key))) for s in SPARSITIES]
    return table(head, [*rows, ["random", *chance]])


def _gap(found: dict[str, Any], method: str, sparsity: str) -> tuple[float, float]:
    """How much more a criterion loses than REAP."""
    return paired(found[f"reap {sparsity}"], found[f"{method} {sparsity}"])


def _differences(found: dict[str, Any]) -> str:
    head = ["criterion", *(percent(float(s)) for s in SPARSITIES)]
    rows = [
        [m, *(plus_minus(_gap(found, m, s), signed=True) for s in SPARSITIES)] for m in METHODS[1:]
    ]
    return table(head, rows)


def _by_domain(found: dict[str, Any]) -> str:
    def cell(name: str, domain: str) -> float:
        return float(found[name]["domains"][domain]["loss"])

    rows = [["original", *(f"{cell(REFERENCE, d):.3f}" for d in DOMAINS)]]
    rows += [[m, *(f"{cell(f'{m} {BY_DOMAIN}', d):.3f}" for d in DOMAINS)] for m in METHODS]
    chance = [
        plus_minus(mean_and_deviation([cell(f"random-{seed} {BY_DOMAIN}", d) for seed in SEEDS]))
        for d in DOMAINS
    ]
    return table(["criterion", *DOMAINS], [*rows, ["random", *chance]])


def _domains_verdict(found: dict[str, Any]) -> str:
    """Where REAP does not beat the mean of random draws, at the sparsity shown by domain."""
    behind = []
    for domain in DOMAINS:
        reap = found[f"reap {BY_DOMAIN}"]["domains"][domain]["loss"]
        drawn = [found[f"random-{seed} {BY_DOMAIN}"]["domains"][domain]["loss"] for seed in SEEDS]
        chance, _ = mean_and_deviation(drawn)
        if reap >= chance:
            behind.append(f"{domain} (by {reap - chance:.3f} nats)")
    if not behind:
        return "REAP loses less than the mean of the random draws in every domain."
    return (
        f"REAP loses no less than the mean of the random draws on {', '.join(behind)}: a choice for "
        "the mix of all domains can cost one of them."
    )


def _verdict(found: dict[str, Any], key: str) -> str:
    """In how many sparsities REAP was lowest, and who was where it was not."""
    others = []
    for sparsity in SPARSITIES:
        values = {m: found[f"{m} {sparsity}"][key] for m in METHODS}
        best = min(values, key=values.__getitem__)
        if best != "reap":
            gap = values["reap"] - values[best]
            others.append(f"{best} was {gap:.4f} lower at {percent(float(sparsity))}")
    led = len(SPARSITIES) - len(others)
    return f"{led} of {len(SPARSITIES)} sparsities" + (f" ({'; '.join(others)})" if others else "")


def _clear(found: dict[str, Any]) -> str:
    """How many differences stand out from their own error."""
    gaps = [_gap(found, m, s) for m in METHODS[1:] for s in SPARSITIES]
    worse = sum(mean > 2 * error for mean, error in gaps)
    better = sum(mean < -2 * error for mean, error in gaps)
    return (
        f"Of these {len(gaps)} differences {worse} are above zero by more than two standard errors "
        f"(REAP lost less) and {better} below zero by as much (REAP lost more)."
    )


def _against_chance(found: dict[str, Any]) -> str:
    """How each criterion stands to the best of the draws."""
    won = {
        m: sum(found[f"{m} {s}"]["loss"] < min(_seeds(found, s, "loss")) for s in SPARSITIES)
        for m in METHODS
    }
    counts = listed([f"{m} at {count}" for m, count in won.items()])
    return (
        f"Below the luckiest of the {len(SEEDS)} random draws lay, of {len(SPARSITIES)} "
        f"sparsities, {counts}."
    )


def _growth(found: dict[str, Any]) -> str:
    """How KL grows from the lowest to the highest sparsity."""
    low, high = SPARSITIES[0], SPARSITIES[-1]
    times = found[f"reap {high}"]["kl"] / found[f"reap {low}"]["kl"]
    return (
        f"from {percent(float(low))} to {percent(float(high))}, {float(high) / float(low):g} times "
        f"as many experts, REAP's KL grows {times:.0f} times"
    )
