"""Pictures over layers and experts: scores, routed tokens, and which source an expert serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from reap_stream.reporting.canvas import INK, MUTED, PALETTE, Picture
from reap_stream.reporting.colours import (
    OTHER_SOURCES,
    heat_colours,
    ramp,
    shown_sources,
    source_colours,
)
from reap_stream.reporting.text import short_label

if TYPE_CHECKING:
    from reap_stream.reporting.figures import Figures

_LEGEND_INCHES: Final = 0.55
_MOST_OCTAVES: Final = 4


def score_map(figures: Figures, method: str) -> Picture:
    """Scores ÷ their layer's mean, with the kept marked."""
    most = score_limit(figures)
    # Most scores lie below the mean: by their roots they are told apart.
    values = np.sqrt(np.clip(figures.relative / most, 0.0, None))
    ticks = [(0.0, "0"), (most**-0.5, "1 = mean of the layer"), (1.0, f"≥ {most:.1f}")]
    return _map(
        figures,
        "scores",
        f"{method} scores of all experts, layer by layer",
        values,
        _Legend("score ÷ mean of the layer", ticks),
    )


def score_limit(figures: Figures) -> float:
    """The ratio to the layer's mean at which colours end: few are above."""
    return max(2.0, float(np.percentile(figures.relative, 99)))


def load_map(figures: Figures) -> Picture:
    """Routed tokens ÷ their layer's mean, on a scale of powers of two."""
    with np.errstate(divide="ignore"):
        octaves = np.log2(figures.load)
    limit = load_limit(figures)
    ends = 2**limit
    ticks = [(0.0, f"≤ 1/{ends}"), (0.5, "1 = mean of the layer"), (1.0, f"≥ {ends}")]
    return _map(
        figures,
        "tokens",
        "tokens routed to all experts, layer by layer",
        (octaves + limit) / (2 * limit),
        _Legend("tokens ÷ mean of the layer", ticks),
    )


def load_limit(figures: Figures) -> int:
    """The power of two, of tokens ÷ their layer's mean, at which colours end: few are beyond."""
    reached = figures.load[figures.load > 0]
    usual = np.percentile(np.abs(np.log2(reached)), 98) if reached.size else 1.0
    return int(min(max(np.ceil(usual), 1), _MOST_OCTAVES))


def source_map(figures: Figures) -> Picture:
    """Which calibration source each expert serves most."""
    sources = shown_sources(figures.tokens)
    colours = source_colours(figures.affinity(), sources, figures.unreached)
    names = [short_label(figures.sources[number], 28) for number in sources]
    shades = [*PALETTE[: len(names)], *([MUTED] if len(figures.sources) > len(names) else [])]
    names += [OTHER_SOURCES] * (len(shades) - len(names))

    def draw(figure: Any) -> None:
        top, bottom = _rows(figure, 0.3 * _legend_lines(figure, len(names)))
        _draw_cells(top, figures, colours)
        bottom.set_axis_off()
        handles = [_swatch(bottom, shade) for shade in shades]
        columns = -(-len(names) // _legend_lines(figure, len(names)))
        bottom.legend(handles, names, loc="center", ncols=columns, handlelength=1.0)

    label = "calibration source that uses each expert most, layer by layer"
    return Picture("sources", label, _heights(figures, 0.3), draw)


def _legend_lines(figure: Any, names: int) -> int:
    columns = 3 if figure.get_figwidth() > 6 else 1
    return -(-names // columns)


def _swatch(axes: Any, colour: str) -> Any:
    (handle,) = axes.plot([], [], "s", color=colour, markersize=8)
    return handle


class _Legend:
    """The scale of a heat map: its title, and positions from 0 to 1 with their words."""

    def __init__(self, title: str, ticks: Sequence[tuple[float, str]]) -> None:
        self.title = title
        self.ticks = ticks


def _map(figures: Figures, name: str, label: str, values: Any, legend: _Legend) -> Picture:
    colours = heat_colours(values, figures.kept, figures.unreached)

    def draw(figure: Any) -> None:
        top, bottom = _rows(figure, _LEGEND_INCHES)
        _draw_cells(top, figures, colours)
        _draw_scale(bottom, legend, removed=figures.kept is not None)

    return Picture(name, label, _heights(figures, _LEGEND_INCHES), draw)


def _heights(figures: Figures, legend: float) -> tuple[float, float]:
    """Rows as high as they need to be seen, within what a screen shows."""
    rows = len(figures.layers)
    wide, narrow = min(max(1.6, 0.11 * rows), 7.5), min(max(1.6, 0.075 * rows), 6.0)
    return wide + legend + 0.7, narrow + legend + 0.9


def _rows(figure: Any, legend: float) -> tuple[Any, Any]:
    height = figure.get_figheight()
    ratios = [height - legend, legend]
    top, bottom = figure.subplots(2, 1, gridspec_kw={"height_ratios": ratios})
    return top, bottom


def _draw_cells(axes: Any, figures: Figures, colours: Any) -> None:
    rows = len(figures.layers)
    extent = (-0.5, figures.num_experts - 0.5, rows - 0.5, -0.5)
    # No interpolation: the cells stand in the page as they are, one pixel each.
    axes.imshow(colours, aspect="auto", interpolation="none", extent=extent)
    step = max(1, -(-rows // 12))
    axes.set_yticks(range(0, rows, step), [str(i) for i in figures.layers[::step]])
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=9, integer=True)


def _draw_scale(axes: Any, legend: _Legend, *, removed: bool) -> None:
    steps = np.linspace(0.0, 1.0, 256)
    bands = [ramp(steps), ramp(steps, grey=True)] if removed else [ramp(steps)]
    axes.imshow(
        np.stack(bands), aspect="auto", interpolation="none", extent=(0.0, 1.0, len(bands), 0.0)
    )
    axes.set_yticks(
        [0.5, 1.5] if removed else [], ["kept", "removed"] if removed else [], color=INK
    )
    axes.set_xticks([place for place, _ in legend.ticks], [word for _, word in legend.ticks])
    for tick, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
        tick.set_horizontalalignment(side)
    axes.set_xlabel(legend.title)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
