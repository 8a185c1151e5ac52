"""Pictures of lines: sorted scores with the cut, what goes in each layer, agreement, evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from reap_stream.reporting.canvas import ACCENT, INK, MUTED, PALETTE, WARN, Picture
from reap_stream.reporting.text import short_label

if TYPE_CHECKING:
    from reap_stream.reporting.evaluation import Evaluated
    from reap_stream.reporting.figures import Figures

_HEIGHT: Final = (3.4, 3.2)
_MOST_LINES: Final = 8
# The part of the colour map that is seen on white and on black.
_SHADES: Final = (0.22, 0.85)


def curve_picture(figures: Figures, method: str) -> Picture:
    """Scores of each layer from the highest to the lowest, and where the cut falls."""
    ordered = -np.sort(-figures.relative, axis=1)
    ranks = np.arange(1, figures.num_experts + 1)
    rows = len(figures.layers)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        shades = mpl.colormaps["viridis"](np.linspace(*_SHADES, rows))
        opacity = max(0.35, min(1.0, 8 / rows))
        for row in range(rows):
            axes.plot(ranks, ordered[row], color=shades[row], alpha=opacity, linewidth=1.0)
        axes.plot(ranks, np.median(ordered, axis=0), color=INK, linewidth=2, label="median")
        if figures.keep is not None:
            place = figures.keep + 0.5
            axes.axvline(place, color=WARN, linewidth=1.5, label=f"cut: {figures.keep} stay")
        axes.legend(loc="upper right")
        axes.set_ylim(0, 1.05 * curve_limit(figures))
        axes.set_xlim(1, figures.num_experts)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        axes.set_xlabel("rank of the expert in its layer")
        axes.set_ylabel(f"{method} score ÷ mean")

    label = "scores of each layer in falling order, first layers dark and last ones bright"
    return Picture("curves", label, _HEIGHT, draw)


def curve_limit(figures: Figures) -> float:
    """The ratio to the layer's mean up to which curves are seen: a few layers may begin far above."""
    highest = figures.relative.max(axis=1)
    return float(min(highest.max(), 1.5 * np.percentile(highest, 90))) or 1.0


def removed_picture(figures: Figures) -> Picture:
    """What the removed experts carried in each layer."""
    series = [
        ("experts", 1 - figures.kept.mean(axis=1), MUTED),  # type: ignore[union-attr]
        ("routed tokens", figures.removed_tokens(), ACCENT),
        ("gate weight × output norm", figures.removed_saliency(), WARN),
    ]

    def draw(figure: Any) -> None:
        axes = _by_layer(figure, figures.layers)
        for name, values, colour in series:
            axes.plot(figures.layers, values, color=colour, label=name, **_dots(figures.layers))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylabel("removed share")
        axes.legend(loc="best")

    return Picture("removed", "share of each layer that goes with its experts", _HEIGHT, draw)


def agreement_picture(figures: Figures) -> Picture:
    """The share of kept experts that two halves of the rows agree on, in each layer."""
    agreed = figures.agreed
    assert agreed is not None

    def draw(figure: Any) -> None:
        axes = _by_layer(figure, figures.layers)
        dots = _dots(figures.layers)
        axes.plot(figures.layers, agreed.shares, color=ACCENT, label="both halves keep", **dots)
        axes.axhline(agreed.chance, color=MUTED, linestyle="--", label="by chance")
        axes.set_ylim(min(agreed.chance, float(agreed.shares.min())) - 0.05, 1.01)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylabel("of the kept experts")
        axes.legend(loc="best")

    return Picture("agreement", "agreement of two halves of the rows by layer", _HEIGHT, draw)


def loss_picture(evaluated: Sequence[Evaluated]) -> Picture:
    """Loss against the removed share, a line for each criterion."""
    reference = evaluated[0]
    lines = loss_lines(evaluated)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, (name, points) in enumerate(lines.items()):
            colour = PALETTE[number % len(PALETTE)]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
        if reference.loss is not None:
            label = f"{short_label(reference.label, 24)}: {reference.loss:.3f}"
            axes.axhline(reference.loss, color=MUTED, linestyle="--", label=label)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("removed experts")
        axes.set_ylabel("loss, nats per token")
        axes.legend(loc="best")

    return Picture("loss", "loss against the share of removed experts", _HEIGHT, draw)


def loss_lines(evaluated: Sequence[Evaluated]) -> dict[str, list[tuple[float, float]]]:
    """Points (removed share, loss) of each criterion; the reference begins each."""
    reference = evaluated[0]
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in evaluated[1:]:
        if one.loss is not None:
            start = [] if reference.loss is None else [(0.0, reference.loss)]
            points = lines.setdefault(one.method or "checkpoints", start)
            points.append((1 - one.keep / reference.keep, one.loss))
    return {name: sorted(points) for name, points in lines.items()}


def error_picture(evaluated: Sequence[Evaluated]) -> Picture:
    """The relative error of hidden states after each layer."""
    shown = [one for one in evaluated[1:] if one.errors][:_MOST_LINES]

    def draw(figure: Any) -> None:
        layers = sorted({layer for one in shown for layer in one.errors})
        axes = _by_layer(figure, layers)
        for number, one in enumerate(shown):
            points = sorted(one.errors.items())
            axes.plot(
                *zip(*points, strict=True),
                color=PALETTE[number % len(PALETTE)],
                label=short_label(one.label, 24),
                **_dots(layers),
            )
        axes.set_ylim(bottom=0)
        axes.set_ylabel("relative error")
        axes.legend(loc="best")

    return Picture("errors", "relative error of hidden states by layer", _HEIGHT, draw)


def _by_layer(figure: Any, layers: Sequence[int]) -> Any:
    axes = figure.subplots()
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    return axes


def _dots(layers: Sequence[int]) -> dict[str, Any]:
    """Points where there are few enough to be seen apart."""
    return {"marker": "o" if len(layers) <= 40 else "", "markersize": 4}
