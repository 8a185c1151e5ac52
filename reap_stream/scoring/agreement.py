"""How far the choice of experts depends on the calibration rows: chosen twice, from half of them each.

Two choices at random would already share keep / E of their experts. With agreement a and chance c,
(a - c) / (1 - c) is what they share beyond it: 0 at chance, 1 where both are the same. Below a half,
the rows that happened to be taken decide as much as the experts do. The choice from all rows rests
on twice the data and agrees better with another such choice than its halves do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from reap_stream.scoring.choosing import Chooser
    from reap_stream.scoring.saliency import LayerStats

_ENOUGH: Final = 0.5


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the choices from two halves of the rows have in common.

    Attributes:
        mean: share of the kept experts that both keep, mean over the layers.
        lowest: the share in the layer where it is lowest.
        layer: that layer.
        chance: the share that two choices at random have on average.
    """

    mean: float
    lowest: float
    layer: int
    chance: float

    @property
    def low(self) -> bool:
        """Whether it is less than half of what it could be above chance."""
        return self.mean - self.chance < _ENOUGH * (1 - self.chance)

    def record(self) -> dict[str, Any]:
        """The part of run.json that speaks of one kept count."""
        return {
            "mean": round(self.mean, 6),
            "lowest": round(self.lowest, 6),
            "layer": self.layer,
            "chance": round(self.chance, 6),
        }


def split_half(chooser: Chooser, layers: Mapping[int, LayerStats], keep: int) -> Agreement:
    """Choose the experts of every layer from each half of the rows, and compare.

    Args:
        chooser: chooses; experts that it protects are in both choices.
        layers: statistics by layer, of which `undivided` finds nothing to say.
        keep: how many experts stay.
    """
    shares: dict[int, float] = {}
    for layer, stats in layers.items():
        halves = stats.halves()
        assert halves is not None
        even, odd = (set(chooser.choose(layer, half, keep)) for half in halves)
        shares[layer] = len(even & odd) / keep
    layer = min(sorted(shares), key=lambda index: shares[index])
    num_experts = layers[layer].shape[1]
    mean = sum(shares.values()) / len(shares)
    return Agreement(mean, shares[layer], layer, keep / num_experts)


def undivided(
    chooser: Chooser, layers: Mapping[int, LayerStats], sources: Sequence[str]
) -> str | None:
    """Why two halves cannot be compared; None where they can.

    Args:
        chooser: tells the criterion and which sources count.
        layers: statistics by layer.
        sources: labels of the calibration sources.
    """
    if chooser.choice.method == "random":
        return "the choice is random"
    halved = [stats.odd for stats in layers.values() if stats.odd is not None]
    if not halved or len(halved) < len(layers):
        return "the scores are of a version that did not take halves"
    for number, source in enumerate(sources):
        if chooser.factors[number] and not any(odd.tokens[number].any() for odd in halved):
            return f"calibration source {source!r} has a single row"
    return None
