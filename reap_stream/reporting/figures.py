"""The figures of a report: arrays over [layers, experts] and what follows from them.

A source's use of an expert is compared by shares, so that a source of many tokens does not hide the
others. With p_s(e) the share of source s' routed tokens of a layer that expert e got, the affinity of
e to s is p_s(e) / sum over sources p(e): 1 / sources where all use it alike, 1 where s alone does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from reap_stream.scoring.agreement import undivided

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from reap_stream.reporting.subject import Subject
    from reap_stream.scoring.choosing import Chooser
    from reap_stream.scoring.saliency import LayerStats

    Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Agreed:
    """What the choices from two halves of the calibration rows have in common.

    Attributes:
        shares: float64 [layers], share of the kept experts that both halves keep.
        chance: the share that two choices at random have on average.
    """

    shares: Matrix
    chance: float


@dataclass(frozen=True, slots=True, eq=False)
class Figures:
    """Everything a report shows of the scores.

    Attributes:
        layers: indices of the scored layers, ascending.
        sources: labels of the calibration sources.
        scores: float64 [layers, experts].
        tokens: int64 [sources, layers, experts], routed tokens.
        saliency: float64 [sources, layers, experts], sums of gate weight × output norm.
        kept: bool [layers, experts]; None: no target.
        agreed: None where it is unknown.
        why_not: why it is.
        alone: bool [sources, layers, experts], what would stay if that source alone were used;
            None without a target, with a single source, and where chance decides.
    """

    layers: tuple[int, ...]
    sources: tuple[str, ...]
    scores: Matrix
    tokens: NDArray[np.int64]
    saliency: Matrix
    kept: NDArray[np.bool_] | None = None
    agreed: Agreed | None = None
    why_not: str = ""
    alone: NDArray[np.bool_] | None = field(default=None, repr=False)

    @property
    def num_experts(self) -> int:
        """Routed experts in each layer of the source."""
        return int(self.scores.shape[1])

    @property
    def keep(self) -> int | None:
        """Experts that stay in a layer, the most of any; None without a target."""
        return None if self.kept is None else int(self.kept.sum(axis=1).max())

    @property
    def relative(self) -> Matrix:
        """float64 [layers, experts], scores ÷ the mean of their layer; 0 where that is 0."""
        return _ratio(self.scores, self.scores.mean(axis=1, keepdims=True))

    @property
    def load(self) -> Matrix:
        """float64 [layers, experts], routed tokens ÷ the mean of their layer."""
        tokens = self.tokens.sum(axis=0).astype(np.float64)
        return _ratio(tokens, tokens.mean(axis=1, keepdims=True))

    @property
    def unreached(self) -> NDArray[np.bool_]:
        """Of type bool [layers, experts]: no token of any source was sent there."""
        found: NDArray[np.bool_] = self.tokens.sum(axis=0) == 0
        return found

    def removed_tokens(self) -> Matrix:
        """float64 [layers], share of the routed tokens that went to experts that go."""
        return self._removed(self.tokens.sum(axis=0).astype(np.float64))

    def removed_saliency(self) -> Matrix:
        """float64 [layers], share of the sums of gate weight × norm that goes with them."""
        return self._removed(np.abs(self.saliency).sum(axis=0))

    def removed_of_source(self, source: int) -> tuple[float, float]:
        """The same two shares of one source, over all layers together."""
        assert self.kept is not None
        tokens, saliency = self.tokens[source].astype(np.float64), np.abs(self.saliency[source])
        return tuple(  # type: ignore[return-value]  # two in, two out
            float(_ratio(np.where(self.kept, 0.0, array).sum(), array.sum()))
            for array in (tokens, saliency)
        )

    def _removed(self, array: Matrix) -> Matrix:
        assert self.kept is not None
        return _ratio(np.where(self.kept, 0.0, array).sum(axis=1), array.sum(axis=1))

    def affinity(self) -> Matrix:
        """float64 [sources, layers, experts], see the module; 0 where no token went."""
        tokens = self.tokens.astype(np.float64)
        shares = _ratio(tokens, tokens.sum(axis=2, keepdims=True))
        return _ratio(shares, shares.sum(axis=0, keepdims=True))

    def specialists(self) -> NDArray[np.bool_]:
        """Of type bool [sources, layers, experts]: affinity halfway from alike to alone, or above."""
        halfway = (1 + 1 / len(self.sources)) / 2
        found: NDArray[np.bool_] = self.affinity() >= halfway
        return found if len(self.sources) > 1 else np.zeros_like(found)


def figures_of(subject: Subject) -> Figures:
    """The figures of scores and of what was chosen from them.

    Raises:
        UsageError: the scores cannot be ranked by the criterion.
    """
    scores, chooser = subject.scores, subject.chooser
    layers = tuple(sorted(scores.layers))
    stats = [scores.layers[layer] for layer in layers]
    figures = Figures(
        layers,
        scores.sources,
        np.stack([chooser.scores(i, own) for i, own in zip(layers, stats, strict=True)]),
        np.stack([own.tokens for own in stats], axis=1),
        np.stack([own.gate_norm_sum for own in stats], axis=1),
    )
    if subject.kept is None:
        return replace(figures, why_not="no target was given")
    counts = {layer: len(experts) for layer, experts in subject.kept.items()}
    why_not = undivided(chooser, scores.layers, scores.sources)
    return replace(
        figures,
        kept=_mask(subject.kept, layers, scores.num_experts),
        agreed=None if why_not else _agreed(chooser, scores.layers, counts),
        why_not=why_not or "",
        alone=_alone(subject, layers, counts),
    )


def _mask(
    kept: Mapping[int, tuple[int, ...]], layers: tuple[int, ...], num_experts: int
) -> NDArray[np.bool_]:
    mask = np.zeros((len(layers), num_experts), dtype=bool)
    for row, layer in enumerate(layers):
        mask[row, list(kept[layer])] = True
    return mask


def _agreed(
    chooser: Chooser, layers: Mapping[int, LayerStats], counts: Mapping[int, int]
) -> Agreed:  # fmt: skip
    shares = []
    for layer in sorted(layers):
        halves = layers[layer].halves()
        assert halves is not None
        even, odd = (set(chooser.choose(layer, half, counts[layer])) for half in halves)
        shares.append(len(even & odd) / counts[layer])
    num_experts = next(iter(layers.values())).shape[1]
    return Agreed(np.array(shares), sum(counts.values()) / len(counts) / num_experts)


def _alone(
    subject: Subject, layers: tuple[int, ...], counts: Mapping[int, int]
) -> NDArray[np.bool_] | None:
    """What each source would keep by itself."""
    scores, chooser = subject.scores, subject.chooser
    if len(scores.sources) < 2 or chooser.choice.method == "random":
        return None
    masks = []
    for number in range(len(scores.sources)):
        own = replace(chooser, factors=np.eye(len(scores.sources))[number])
        kept = {i: own.choose(i, scores.layers[i], counts[i]) for i in layers}
        masks.append(_mask(kept, layers, scores.num_experts))
    return np.stack(masks)


def _ratio(part: Matrix | np.float64, whole: Matrix | np.float64) -> Matrix:
    """``part / whole``; 0 where the whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part), np.asarray(whole))
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole != 0)
