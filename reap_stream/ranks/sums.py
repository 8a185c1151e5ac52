"""The statistics of a layer, from what each rank saw of the calibration rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load, save

from reap_stream.scoring.saliency import LayerStats

if TYPE_CHECKING:
    from reap_stream.ranks.base import Ranks

_LOST = "lost"


def sum_over_ranks(ranks: Ranks, stats: LayerStats, lost: int) -> tuple[LayerStats, int]:
    """Adds up the statistics of all ranks in the order of the ranks, so that all get the same bits.

    Args:
        ranks: the ranks.
        stats: what the layer did on this rank's rows; zeros where it has none.
        lost: expert outputs that were left out of them.

    Returns:
        The sums over all ranks.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in stats.arrays().items()}
    own = save({**arrays, _LOST: np.array([lost], dtype=np.int64)})
    found = [load(message) for message in ranks.gather(own)]
    # The library gives arrays that cannot be written.
    total = LayerStats.of_arrays({name: array.copy() for name, array in found[0].items()})
    for other in found[1:]:
        total.add(LayerStats.of_arrays(other))
    return total, sum(int(arrays[_LOST][0]) for arrays in found)
