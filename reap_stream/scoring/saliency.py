"""What the calibration pass learns about each expert: sums that add, and the scores they lead to.

REAP (Lasby et al., arXiv 2510.13999, eq. 9) scores expert j by

    S_j = 1/|X_j| * sum over tokens x in X_j of  g_j(x) * ||f_j(x)||_2

over the tokens X_j that the router sent to it, with gate weight g_j and expert output f_j. Kept
are the sums, per calibration source, in float64: so several runs merge by addition, and every
criterion of `METHODS` follows from one file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np

from reap_stream.errors import CalibrationError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

METHODS = ("reap", "ean", "frequency", "gate", "random")


@dataclass(slots=True)
class LayerStats:
    """Sums of one MoE layer over routed tokens; every array is [sources, experts].

    Attributes:
        tokens: int64, tokens the router sent to the expert.
        gate_sum: float64, sum of the gate weights g.
        norm_sum: float64, sum of the output norms ||f||.
        gate_norm_sum: float64, sum of g * ||f||.
        norm_max: float64, largest ||f||.
    """

    tokens: NDArray[np.int64]
    gate_sum: NDArray[np.float64]
    norm_sum: NDArray[np.float64]
    gate_norm_sum: NDArray[np.float64]
    norm_max: NDArray[np.float64]

    @classmethod
    def zeros(cls, num_sources: int, num_experts: int) -> LayerStats:
        """Return the statistics of no token at all."""
        shape = (num_sources, num_experts)
        sums = [np.zeros(shape, np.float64) for _ in range(4)]
        return cls(np.zeros(shape, np.int64), *sums)

    @property
    def shape(self) -> tuple[int, int]:
        """Sources and experts."""
        num_sources, num_experts = self.tokens.shape
        return num_sources, num_experts

    def add(self, other: LayerStats) -> None:
        """Add the statistics of further tokens in place; `norm_max` takes the larger.

        Raises:
            CalibrationError: `other` is of another shape.
        """
        if self.shape != other.shape:
            raise CalibrationError(
                f"statistics of [sources, experts] {list(other.shape)} cannot be added to"
                f" {list(self.shape)}"
            )
        for name in STATISTICS:
            combine = np.maximum if name == "norm_max" else np.add
            mine: NDArray[np.generic] = getattr(self, name)
            combine(mine, getattr(other, name), out=mine)

    def check(self, label: str = "scores") -> None:
        """Refuse statistics that no run of a sound model yields.

        Args:
            label: what they belong to, e.g. ``"layer 3"``, for the message.

        Raises:
            CalibrationError: a shape or dtype is wrong, a sum is not finite, a count, norm or
                maximum is negative, or an expert without tokens has sums.
        """
        for name, dtype in STATISTICS.items():
            array = getattr(self, name)
            if array.shape != self.tokens.shape or array.ndim != 2 or array.dtype != dtype:
                raise CalibrationError(
                    f"{label}: {name} is {array.dtype} {list(array.shape)}; it must be"
                    f" {dtype} {list(self.tokens.shape)} of [sources, experts]"
                )
            bad = ~np.isfinite(array)
            if name in {"tokens", "norm_sum", "norm_max"}:
                bad |= array < 0
            if name != "tokens":
                bad |= (self.tokens == 0) & (array != 0)
            _refuse_first(bad, array, f"{label}: {name}")


STATISTICS: dict[str, np.dtype[np.generic]] = {
    entry.name: np.dtype(np.int64 if entry.name == "tokens" else np.float64)
    for entry in fields(LayerStats)
}
"""Name and dtype of each statistic, in the order of the file."""


@dataclass(slots=True)
class Scores:
    """Statistics of a model's MoE layers over one or more calibration sources.

    Attributes:
        layers: by index of the decoder layer.
        sources: labels of the calibration sources: the rows of every array.
        num_experts: routed experts of each layer.
        model_fingerprint: names the model the statistics belong to.
        metadata: further strings to keep beside them, e.g. the corpus' sha256.
    """

    layers: dict[int, LayerStats]
    sources: tuple[str, ...]
    num_experts: int
    model_fingerprint: str
    metadata: dict[str, str] = field(default_factory=dict)

    def check(self, label: str = "scores") -> None:
        """Refuse scores that contradict themselves.

        Args:
            label: the file they come from, for the message.

        Raises:
            CalibrationError: no layer, no source, a source twice, or a layer whose arrays are not
                [sources, experts] or hold what `LayerStats.check` refuses.
        """
        if not self.layers or not self.sources or len(set(self.sources)) != len(self.sources):
            raise CalibrationError(
                f"{label}: {len(self.layers)} layers and sources {list(self.sources)}: there must"
                " be one of each at least, and no source twice"
            )
        expected = (len(self.sources), self.num_experts)
        for layer, stats in self.layers.items():
            stats.check(f"{label}: layer {layer}")
            if stats.shape != expected:
                raise CalibrationError(
                    f"{label}: layer {layer} is [sources, experts] {list(stats.shape)}, not"
                    f" {list(expected)}"
                )


def merge_scores(runs: Sequence[Scores]) -> Scores:
    """Merge several calibration runs of one model.

    Rows of sources with the same label are summed, other sources are appended in the order in
    which they come. Metadata is kept where all runs agree on it.

    Raises:
        CalibrationError: no run is given, or two differ in model, layers or experts.
    """
    if not runs:
        raise CalibrationError("no scores to merge: give at least one file")
    first = runs[0]
    for number, run in enumerate(runs, start=1):
        run.check(f"scores {number}")
        _check_same_model(first, run, number)
    sources = tuple(dict.fromkeys(label for run in runs for label in run.sources))
    layers: dict[int, LayerStats] = {}
    for layer in sorted(first.layers):
        layers[layer] = LayerStats.zeros(len(sources), first.num_experts)
        for run in runs:
            layers[layer].add(_spread(run.layers[layer], run.sources, sources))
    shared = {
        key: value
        for key, value in first.metadata.items()
        if all(run.metadata.get(key) == value for run in runs)
    }
    return Scores(layers, sources, first.num_experts, first.model_fingerprint, shared)


def expert_scores(stats: LayerStats, method: str, seed: int, layer: int) -> NDArray[np.float64]:
    """Score the experts of one layer, over all sources together.

    Args:
        stats: the layer's sums, [sources, experts].
        method: ``reap``: mean of g * ||f|| over the expert's tokens (eq. 9) · ``ean``: mean output
            norm ||f|| · ``frequency``: number of tokens · ``gate``: mean gate weight g ·
            ``random``: uniform in [0, 1), a baseline.
        seed: of ``random``, 0 or more.
        layer: index of the layer; with the seed it decides ``random``, whatever was scored before.

    Returns:
        float64 [experts]; 0 for an expert that no token reached, except with ``random``.

    Raises:
        UsageError: there is no such method.
    """
    if method == "random":
        return np.random.default_rng((seed, layer)).random(stats.shape[1])
    tokens: NDArray[np.int64] = stats.tokens.sum(axis=0)
    if method == "frequency":
        return tokens.astype(np.float64)
    sums = {"reap": stats.gate_norm_sum, "ean": stats.norm_sum, "gate": stats.gate_sum}
    if method not in sums:
        raise UsageError(f"no scoring method {method!r}: there are {', '.join(METHODS)}")
    total: NDArray[np.float64] = sums[method].sum(axis=0)
    total[tokens == 0] = 0.0
    return total / np.maximum(tokens, 1)


def unreached(stats: LayerStats) -> list[int]:
    """Return the experts that no token of any source reached."""
    return [int(expert) for expert in np.flatnonzero(stats.tokens.sum(axis=0) == 0)]


def _refuse_first(bad: NDArray[np.bool_], array: NDArray[np.generic], label: str) -> None:
    if bad.any():
        source, expert = np.argwhere(bad)[0]
        raise CalibrationError(
            f"{label} of source {source}, expert {expert} is {array[source, expert]}"
            f" ({int(bad.sum())} such): the hidden states overflowed or the sums are damaged; if"
            " this came from a run, repeat it with --compute-dtype float32"
        )


def _check_same_model(first: Scores, run: Scores, number: int) -> None:
    for what, mine, other in (
        ("model", first.model_fingerprint, run.model_fingerprint),
        ("number of experts", first.num_experts, run.num_experts),
        ("MoE layers", sorted(first.layers), sorted(run.layers)),
    ):
        if mine != other:
            raise CalibrationError(
                f"scores {number} cannot be merged with scores 1: their {what} is {other}, not {mine}"
            )


def _spread(stats: LayerStats, labels: tuple[str, ...], sources: tuple[str, ...]) -> LayerStats:
    """Return the statistics with the rows of `labels` laid out as `sources`, others zero."""
    wide = LayerStats.zeros(len(sources), stats.shape[1])
    rows = [sources.index(label) for label in labels]
    for name in STATISTICS:
        getattr(wide, name)[rows] = getattr(stats, name)
    return wide
