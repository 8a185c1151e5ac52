"""From statistics to kept experts: the one way that every job goes.

    chooser = open_chooser(scores.layers, scores.sources, choice, groups=8, num_layers=92)
    kept = chooser.choose(3, scores.layers[3], keep=96)

The score of an expert is a matter of its layer alone. Which experts are protected depends on all
layers: a chooser that protects and does not know them yet has `protected` None, and cannot choose.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from reap_stream.errors import UsageError
from reap_stream.scoring.saliency import expert_scores
from reap_stream.scoring.selection import select
from reap_stream.scoring.super_experts import super_experts
from reap_stream.scoring.weights import source_factors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from reap_stream.scoring.saliency import LayerStats, Sums

PROTECT_CHOICES = ("none", "super")


class Choice(Protocol):
    """What the user said about the choice; see `ChoiceSettings`."""

    @property
    def method(self) -> str:
        """The criterion, one of `METHODS`."""
        ...

    @property
    def seed(self) -> int:
        """Of the criterion ``random``."""
        ...

    @property
    def source_weights(self) -> tuple[tuple[str, float], ...]:
        """Label and weight of calibration sources; see `source_factors`."""
        ...

    @property
    def protect(self) -> str:
        """Which experts stay whatever their score, one of `PROTECT_CHOICES`."""
        ...


@dataclass(frozen=True, slots=True)
class Chooser:
    """Chooses the experts of a model's layers.

    Attributes:
        choice: what the user said.
        factors: float64 [sources], the weight of each.
        groups: the router's group count; 1 where it has none.
        num_layers: layers of the decoder, dense ones too.
        protected: layer → experts that stay; None: not known before all layers are scored.
    """

    choice: Choice
    factors: NDArray[np.float64] = field(repr=False)
    groups: int
    num_layers: int
    protected: Mapping[int, tuple[int, ...]] | None

    def scores(self, layer: int, stats: Sums) -> NDArray[np.float64]:
        """The scores of a layer's experts, float64 [experts]."""
        return expert_scores(stats, self.choice.method, self.choice.seed, layer, self.factors)

    def choose(self, layer: int, stats: Sums, keep: int) -> tuple[int, ...]:
        """The experts that stay: those that are protected, then the highest scores.

        Args:
            layer: index of the layer.
            stats: its sums, over all rows or half of them.
            keep: how many stay.

        Returns:
            Their indices, ascending.

        Raises:
            UsageError: more are protected than there are places.
            CalibrationError: a score is NaN.
        """
        assert self.protected is not None
        protected = self.protected.get(layer, ())
        self._check_places(layer, stats.shape[1], keep)
        return select(self.scores(layer, stats), keep, self.groups, protected)

    def knowing(self, layers: Mapping[int, LayerStats]) -> Chooser:
        """The chooser that knows which experts are protected, from all scored layers.

        Raises:
            UsageError: the statistics do not tell.
        """
        found = {}
        if self.choice.protect == "super":
            found = super_experts(layers, self.factors, self.num_layers)
        return replace(self, protected=found)

    def check(self, num_experts: int, keep: int) -> None:
        """Refuse a kept count that leaves too few places for the protected experts.

        Raises:
            UsageError: it does.
        """
        for layer in self.protected or {}:
            self._check_places(layer, num_experts, keep)

    def _check_places(self, layer: int, num_experts: int, keep: int) -> None:
        protected = (self.protected or {}).get(layer, ())
        group_of = np.array(protected, dtype=np.int64) // (num_experts // self.groups)
        counts = np.bincount(group_of, minlength=1)
        places = keep // self.groups
        if counts.max() > places:
            raise UsageError(
                f"layer {layer}: {counts.max()} protected experts in router group {counts.argmax()}"
                f" of {self.groups}, and keeping {keep} leaves {places} places in each: keep at"
                f" least {counts.max() * self.groups}, or say --protect none"
            )


def new_chooser(sources: Sequence[str], choice: Choice, *, groups: int, num_layers: int) -> Chooser:
    """A chooser for layers that are still to be scored.

    Args:
        sources: labels of the calibration sources.
        choice: what the user said.
        groups: the router's group count; 1 where it has none.
        num_layers: layers of the decoder, dense ones too.

    Raises:
        UsageError: weights of sources that there are not, or no such kind of protection.
    """
    if choice.protect not in PROTECT_CHOICES:
        raise UsageError(
            f"cannot protect {choice.protect!r}: there are {', '.join(PROTECT_CHOICES)}"
        )
    factors = source_factors(choice.source_weights, sources)
    return Chooser(choice, factors, groups, num_layers, {} if choice.protect == "none" else None)


def open_chooser(
    layers: Mapping[int, LayerStats],
    sources: Sequence[str],
    choice: Choice,
    *,
    groups: int,
    num_layers: int,
) -> Chooser:
    """A chooser for a model of which all layers are scored; see `new_chooser`.

    Args:
        layers: statistics by layer; layers behind the decoder may be among them.
        sources: labels of the calibration sources.
        choice: what the user said.
        groups: the router's group count; 1 where it has none.
        num_layers: layers of the decoder, dense ones too.

    Raises:
        UsageError: weights of sources that there are not, or scores without what protecting needs.
    """
    return new_chooser(sources, choice, groups=groups, num_layers=num_layers).knowing(layers)


def choose_experts(
    layers: Mapping[int, LayerStats],
    sources: Sequence[str],
    keep: int,
    choice: Choice,
    *,
    groups: int,
    num_layers: int,
) -> dict[int, tuple[int, ...]]:
    """Choose the experts of every scored layer; arguments and errors as `open_chooser` has them.

    Returns:
        Layer → the `keep` experts that stay, ascending.
    """
    chooser = open_chooser(layers, sources, choice, groups=groups, num_layers=num_layers)
    return {layer: chooser.choose(layer, layers[layer], keep) for layer in sorted(layers)}
