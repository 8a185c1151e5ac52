"""What the calibration pass learns about each expert: sums that add, and the scores they lead to.

REAP (Lasby et al., arXiv 2510.13999, eq. 9) scores expert j by

    S_j = 1/|X_j| * sum over tokens x in X_j of  g_j(x) * ||f_j(x)||_2

over the tokens X_j that the router sent to it, with gate weight g_j and expert output f_j. Kept
are the sums, per calibration source, in float64: so several runs merge by addition, and every
criterion of `METHODS` follows from one file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from reap_stream.errors import CalibrationError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

METHODS = ("reap", "ean", "frequency", "gate", "random")


@dataclass(slots=True)
class Sums:
    """What adds up over routed tokens, of one MoE layer; every array is [sources, experts].

    Attributes:
        tokens: int64, tokens the router sent to the expert.
        gate_sum: float64, sum of the gate weights g.
        norm_sum: float64, sum of the output norms ||f||.
        gate_norm_sum: float64, sum of g * ||f||.
    """

    tokens: NDArray[np.int64]
    gate_sum: NDArray[np.float64]
    norm_sum: NDArray[np.float64]
    gate_norm_sum: NDArray[np.float64]

    @property
    def shape(self) -> tuple[int, int]:
        """Sources and experts."""
        num_sources, num_experts = self.tokens.shape
        return num_sources, num_experts


@dataclass(slots=True)
class LayerStats(Sums):
    """What one MoE layer did on all rows, and how much of it on half of them.

    Attributes:
        norm_max: float64, largest ||f||.
        output_max: float64, largest |element| of f; None in files of earlier versions.
        odd: the sums over one of the two halves of the rows (see `halves`); None as above.
    """

    norm_max: NDArray[np.float64]
    output_max: NDArray[np.float64] | None = None
    odd: Sums | None = None

    @classmethod
    def zeros(cls, num_sources: int, num_experts: int) -> LayerStats:
        """Return the statistics of no token at all."""
        shape = (num_sources, num_experts)
        total, odd = (
            {name: np.zeros(shape, dtype) for name, dtype in SUMS.items()} for _ in range(2)
        )
        return cls(**total, norm_max=np.zeros(shape), output_max=np.zeros(shape), odd=Sums(**odd))

    def halves(self) -> tuple[Sums, Sums] | None:
        """The sums over the even and over the odd half of the rows; None where they are unknown."""
        if self.odd is None:
            return None
        even = {name: getattr(self, name) - getattr(self.odd, name) for name in SUMS}
        return Sums(**even), self.odd

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays there are, by the names of the file: `output_max` and ``odd.*`` may lack."""
        found = {name: getattr(self, name) for name in STATISTICS}
        if self.output_max is not None:
            found["output_max"] = self.output_max
        if self.odd is not None:
            found |= {f"odd.{name}": getattr(self.odd, name) for name in SUMS}
        return found

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> LayerStats:
        """Make statistics of what `arrays` gave; `STATISTICS` must all be there."""
        odd = {name: arrays[f"odd.{name}"] for name in SUMS if f"odd.{name}" in arrays}
        required = {name: arrays[name] for name in STATISTICS}
        return cls(
            **required, output_max=arrays.get("output_max"), odd=Sums(**odd) if odd else None
        )

    def add(self, other: LayerStats) -> None:
        """Add the statistics of further tokens in place; maxima take the larger.

        What one of the two lacks, the sum lacks.

        Raises:
            CalibrationError: `other` is of another shape.
        """
        if self.shape != other.shape:
            raise CalibrationError(
                f"statistics of [sources, experts] {list(other.shape)} cannot be added to"
                f" {list(self.shape)}"
            )
        if other.output_max is None:
            self.output_max = None
        if other.odd is None:
            self.odd = None
        theirs = other.arrays()
        for name, mine in self.arrays().items():
            combine = np.maximum if name in MAXIMA else np.add
            combine(mine, theirs[name], out=mine)

    def check(self, label: str = "scores") -> None:
        """Refuse statistics that no run of a sound model yields.

        Args:
            label: what they belong to, e.g. ``"layer 3"``, for the message.

        Raises:
            CalibrationError: a shape or dtype is wrong, a sum is not finite, a count, norm or
                maximum is negative, an expert without tokens has sums, or half of the rows sent it
                more tokens than all.
        """
        arrays = self.arrays()
        for name, array in arrays.items():
            own = name.removeprefix("odd.")
            dtype = np.dtype(np.int64 if own == "tokens" else np.float64)
            if array.shape != self.tokens.shape or array.ndim != 2 or array.dtype != dtype:
                raise CalibrationError(
                    f"{label}: {name} is {array.dtype} {list(array.shape)}; it must be"
                    f" {dtype} {list(self.tokens.shape)} of [sources, experts]"
                )
        for name, array in arrays.items():
            own = name.removeprefix("odd.")
            bad = ~np.isfinite(array)
            if own in _NOT_NEGATIVE:
                bad |= array < 0
            if own != "tokens":
                tokens = arrays["odd.tokens"] if own != name else self.tokens
                bad |= (tokens == 0) & (array != 0)
            elif own != name:
                bad |= array > self.tokens
            _refuse_first(bad, array, f"{label}: {name}")


SUMS: dict[str, np.dtype[np.generic]] = {
    entry.name: np.dtype(np.int64 if entry.name == "tokens" else np.float64)
    for entry in fields(Sums)
}
"""Name and dtype of what adds up."""
MAXIMA = ("norm_max", "output_max")
STATISTICS: dict[str, np.dtype[np.generic]] = {**SUMS, "norm_max": np.dtype(np.float64)}
"""Name and dtype of each statistic that every file has, in its order."""
OPTIONAL_STATISTICS: dict[str, np.dtype[np.generic]] = {
    "output_max": np.dtype(np.float64),
    **{f"odd.{name}": dtype for name, dtype in SUMS.items()},
}
"""Name and dtype of those that files of earlier versions lack."""
_NOT_NEGATIVE = ("tokens", "norm_sum", *MAXIMA)


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


def expert_scores(
    stats: Sums, method: str, seed: int, layer: int, weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Score the experts of one layer, over all sources together.

    Args:
        stats: the layer's sums, [sources, experts].
        method: ``reap``: mean of g * ||f|| over the expert's tokens (eq. 9) · ``ean``: mean output
            norm ||f|| · ``frequency``: number of tokens · ``gate``: mean gate weight g ·
            ``random``: uniform in [0, 1), a baseline.
        seed: of ``random``, 0 or more.
        layer: index of the layer; with the seed it decides ``random``, whatever was scored before.
        weights: float64 [sources]: as if a source's tokens had come that often; None: once each.

    Returns:
        float64 [experts]; 0 for an expert that no token reached, except with ``random``.

    Raises:
        UsageError: there is no such method.
    """
    num_sources, num_experts = stats.shape
    if method == "random":
        return np.random.default_rng((seed, layer)).random(num_experts)
    factors = np.ones(num_sources) if weights is None else weights
    tokens: NDArray[np.float64] = (stats.tokens * factors[:, None]).sum(axis=0)
    if method == "frequency":
        return tokens
    sums = {"reap": stats.gate_norm_sum, "ean": stats.norm_sum, "gate": stats.gate_sum}
    if method not in sums:
        raise UsageError(f"no scoring method {method!r}: there are {', '.join(METHODS)}")
    total: NDArray[np.float64] = (sums[method] * factors[:, None]).sum(axis=0)
    reached = tokens > 0
    return np.divide(total, tokens, out=np.zeros(num_experts), where=reached)


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
