"""Super experts: the few whose outputs hold the model's largest activations (arXiv 2507.23279).

Su et al. (equation 6) call an expert super if its a, the largest |element| of its outputs, is

    above the 99.5th percentile of all a,    above a tenth of the largest a,
    and in a layer in which massive activations form,

for which the authors' code takes the first three quarters of the layers. Here "all a" are those of
every expert of the decoder's Mixture-of-Experts layers, and layers are counted as the decoder counts
them, dense ones too. Next-token-prediction layers have no part in it: they are behind the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from reap_stream.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from reap_stream.scoring.saliency import LayerStats

_PERCENTILE: Final = 99.5
_SHARE_OF_LARGEST: Final = 0.1


def super_experts(
    layers: Mapping[int, LayerStats], factors: NDArray[np.float64], num_layers: int
) -> dict[int, tuple[int, ...]]:
    """Find the super experts.

    Args:
        layers: statistics by layer.
        factors: float64 [sources]; a source of factor 0 is left out.
        num_layers: layers of the decoder, dense ones too; layers behind them do not count.

    Returns:
        Layer → its super experts, ascending; only layers that have any.

    Raises:
        UsageError: statistics of a layer have no `output_max`.
    """
    largest = {
        layer: _largest(layer, stats, factors)
        for layer, stats in sorted(layers.items())
        if layer < num_layers
    }
    if not largest:
        return {}
    every = np.concatenate(list(largest.values()))
    bound = max(float(np.percentile(every, _PERCENTILE)), _SHARE_OF_LARGEST * float(every.max()))
    found = {
        layer: tuple(int(expert) for expert in np.flatnonzero(values > bound))
        for layer, values in largest.items()
        if 4 * layer < 3 * num_layers
    }
    return {layer: experts for layer, experts in found.items() if experts}


def _largest(layer: int, stats: LayerStats, factors: NDArray[np.float64]) -> NDArray[np.float64]:
    if stats.output_max is None:
        raise UsageError(
            f"--protect super: the scores of layer {layer} have no output_max, which earlier versions"
            " did not take: observe again, or say --protect none"
        )
    largest: NDArray[np.float64] = stats.output_max[factors > 0].max(axis=0)
    return largest
