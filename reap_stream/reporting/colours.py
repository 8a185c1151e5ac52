"""The colours of heat maps: kept experts in colour, removed ones in grey of the same lightness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgb

from reap_stream.reporting.canvas import PALETTE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Colours = NDArray[np.uint8]

_UNREACHED: Final = np.array([207, 34, 46], dtype=np.uint8)
# Below, colour and grey look the same.
_DARKEST: Final = 0.12
_INDIFFERENT: Final = np.array([128, 128, 128], dtype=np.float64)
# Of red, green and blue in the lightness of a colour (ITU-R BT.709).
_LIGHTNESS: Final = np.array([0.2126, 0.7152, 0.0722])
OTHER_SOURCES: Final = "others"


def ramp(values: NDArray[np.float64], *, grey: bool = False) -> Colours:
    """Colours of values.

    Args:
        values: float64 of any shape, from 0, dark, to 1, bright; others count as the nearer end.
        grey: in grey of the lightness that the colours have.

    Returns:
        uint8 [..., 3].
    """
    colours = mpl.colormaps["viridis"](_DARKEST + (1 - _DARKEST) * np.clip(values, 0.0, 1.0))[
        ..., :3
    ]
    if grey:
        colours = np.repeat((colours @ _LIGHTNESS)[..., None], 3, axis=-1)
    found: Colours = np.round(255 * colours).astype(np.uint8)
    return found


def heat_colours(
    values: NDArray[np.float64], kept: NDArray[np.bool_] | None, unreached: NDArray[np.bool_]
) -> Colours:
    """Colours of a heat map.

    Args:
        values: float64 [layers, experts], 0 to 1.
        kept: bool [layers, experts]: the others become grey; None: all in colour.
        unreached: bool [layers, experts]: these become red, kept or not.

    Returns:
        uint8 [layers, experts, 3].
    """
    colours = ramp(values)
    if kept is not None:
        colours = np.where(kept[..., None], colours, ramp(values, grey=True))
    colours[unreached] = _UNREACHED
    return colours


def shown_sources(tokens: NDArray[np.int64]) -> list[int]:
    """The sources that have a colour of their own: those of the most tokens, in the order given.

    Args:
        tokens: int64 [sources, layers, experts].
    """
    totals = tokens.sum(axis=(1, 2))
    most = np.argsort(-totals, kind="stable")[: len(PALETTE)]
    return sorted(int(number) for number in most)


def source_colours(
    affinity: NDArray[np.float64], sources: list[int], unreached: NDArray[np.bool_]
) -> Colours:
    """Colours of the sources that experts serve: grey where all alike, full where one alone.

    Args:
        affinity: float64 [sources, layers, experts].
        sources: those that have a colour; experts that serve another most stay grey.
        unreached: bool [layers, experts], in red.

    Returns:
        uint8 [layers, experts, 3].
    """
    count = affinity.shape[0]
    hues = np.tile(_INDIFFERENT, (count, 1))
    for place, source in enumerate(sources):
        hues[source] = 255 * np.array(to_rgb(PALETTE[place]))
    strength = (affinity.max(axis=0) - 1 / count) / max(1 - 1 / count, 1e-9)
    strength = np.clip(strength, 0.0, 1.0)[..., None]
    colours = strength * hues[affinity.argmax(axis=0)] + (1 - strength) * _INDIFFERENT
    found: Colours = np.round(colours).astype(np.uint8)
    found[unreached] = _UNREACHED
    return found
