"""What run.json says of the choice of experts beside its result, and what people are told of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reap_stream.scoring.agreement import Agreement, split_half, undivided
from reap_stream.scoring.choosing import Chooser
from reap_stream.stored_scores import StoredScores


def choice_findings(
    chooser: Chooser, stored: StoredScores, keeps: Sequence[int]
) -> dict[str, Any]:  # fmt: skip
    """The part of run.json that speaks of protected experts and of how settled the choice is.

    Args:
        chooser: chose the experts.
        stored: the statistics of all layers.
        keeps: kept counts of the targets.
    """
    layers = stored.layers
    protected = {str(layer): list(experts) for layer, experts in (chooser.protected or {}).items()}
    why_not = undivided(chooser, layers, stored.sources)
    if why_not is not None:
        return {"protected": protected, "split_half": {}, "split_half_missing": why_not}
    found = {str(keep): split_half(chooser, layers, keep).record() for keep in keeps}
    return {"protected": protected, "split_half": found}


def choice_notes(details: Mapping[str, Any]) -> Iterator[str]:
    """What the user should know of it.

    Args:
        details: what run.json says.
    """
    protect = details.get("settings", {}).get("protect", "none")
    if protect != "none":
        protected = details.get("protected", {})
        count = sum(len(experts) for experts in protected.values())
        where = f" in layers {', '.join(protected)} (listed in reap/run.json)" if count else ""
        yield f"--protect {protect}: {count} experts stay whatever their score{where}"
    for keep, found in details.get("split_half", {}).items():
        agreement = Agreement(**found)
        if agreement.chance < 1:
            yield f"keep {keep}: {_agreement(agreement)}"
    missing = details.get("split_half_missing")
    if missing is not None:
        yield f"no agreement between two halves of the calibration rows: {missing}"


def _agreement(found: Agreement) -> str:
    text = (
        f"the two halves of the calibration rows keep {found.mean:.1%} of the experts in common "
        f"({found.lowest:.1%} in layer {found.layer}; {found.chance:.1%} would be chance)"
    )
    if not found.low:
        return text
    return (
        f"{text}: which rows were taken decides as much as what the experts do; calibrate on more "
        "rows, or longer ones"
    )
