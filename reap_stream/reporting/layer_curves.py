"""A small curve for each layer, drawn without matplotlib: a hundred of them must stay small."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reap_stream.reporting.text import percent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from reap_stream.reporting.figures import Figures

_HEIGHT = 100


def layer_curves(figures: Figures) -> str:
    """Scores of each layer in falling order: those that stay, those that go, and the cut."""
    gone = None if figures.kept is None else figures.removed_saliency()
    cells = []
    for row, layer in enumerate(figures.layers):
        note = "" if gone is None else f"−{percent(gone[row])}"
        caption = f"<figcaption><span>{layer}</span><span>{note}</span></figcaption>"
        kept = None if figures.kept is None else figures.kept[row]
        cells.append(f"<figure>{_curve(layer, figures.scores[row], kept)}{caption}</figure>")
    return f'<div class="layers">{"".join(cells)}</div>'


def _curve(layer: int, scores: NDArray[np.float64], kept: NDArray[np.bool_] | None) -> str:
    order = np.argsort(-scores, kind="stable")
    if kept is not None:
        # Experts that stay come first: where groups or protection decide, not by score alone.
        order = np.concatenate([order[kept[order]], order[~kept[order]]])
    most = max(float(scores.max()), np.finfo(float).tiny)
    # Negative scores are as good as none here.
    heights = np.round(_HEIGHT * np.clip(scores[order] / most, 0.0, 1.0)).astype(int).tolist()
    count = len(heights)
    cut = count if kept is None else int(kept.sum())
    parts = [_bars(heights[:cut], 0, "stays")]
    if cut < count:
        line = f'<path class="cut" d="M{cut} 0V{_HEIGHT}"/>'
        parts += [_bars(heights[cut:], cut, "goes"), line]
    return (
        f'<svg viewBox="0 0 {count} {_HEIGHT}" preserveAspectRatio="none" role="img"'
        f' aria-label="scores of layer {layer} in falling order">{"".join(parts)}</svg>'
    )


def _bars(heights: list[int], start: int, css_class: str) -> str:
    """One path of steps, each as wide as an expert."""
    steps = "".join(f"V{_HEIGHT - height}h1" for height in heights)
    return f'<path class="{css_class}" d="M{start} {_HEIGHT}{steps}V{_HEIGHT}z"/>'
