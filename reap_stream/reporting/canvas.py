"""How pictures are drawn: one look for all, each for wide and for narrow screens and as a file."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from reap_stream.reporting.svg import inline_svg

INK, MUTED, GRID, PAGE, ACCENT, WARN = (
    "#1b1f24", "#59636e", "#d0d7de", "#ffffff", "#0969da", "#bc4c00",
)  # fmt: skip
# Told apart in both themes and by most eyes (Okabe and Ito), the darkest and palest left out.
PALETTE: Final = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#d55e00",
    "#56b4e9",
    "#8c6bb1",
    "#8a6d3b",
)
_LOOK: Final[dict[str, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "reap-stream",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
SOFTWARE: Final = "reap-stream report"
_WIDE_INCHES: Final = 9.2
_NARROW_INCHES: Final = 4.7
_DOTS_PER_INCH: Final = 160


@dataclass(frozen=True, slots=True)
class Picture:
    """Something to draw.

    Attributes:
        name: a word for ids and file names.
        label: what it shows, for those who do not see it.
        height: inches; the first on wide screens, the second on narrow ones.
        draw: draws on an empty figure.
    """

    name: str
    label: str
    height: tuple[float, float]
    draw: Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A picture that was drawn.

    Attributes:
        html: its elements, of which style sheets show the one that fits the screen.
        png: the wide one as a file.
    """

    html: str
    png: bytes


def render(picture: Picture) -> Rendered:
    """Draws a picture, whatever the user's own settings of matplotlib are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_LOOK)
        wide = _drawn(picture, _WIDE_INCHES, picture.height[0])
        narrow = _drawn(picture, _NARROW_INCHES, picture.height[1])
        elements = (
            _svg(wide, picture, "wide"),
            _svg(narrow, picture, "narrow"),
        )
        return Rendered("\n".join(elements), _png(wide))


def _drawn(picture: Picture, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    picture.draw(figure)
    return figure


def _svg(figure: Figure, picture: Picture, kind: str) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg")
    return inline_svg(stream.getvalue(), f"{picture.name}-{kind}", picture.label, kind)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(
        stream,
        format="png",
        dpi=_DOTS_PER_INCH,
        facecolor=PAGE,
        metadata={"Software": SOFTWARE},
    )
    return stream.getvalue()
