"""Running sums of what the experts of one layer did, in float64, by calibration source.

On the CPU the extension sums straight from the outputs; on other devices torch does, and the sums
stay there until the layer is done, so that no batch waits for them. Every source has a cell for each
half of its rows.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import torch

from reap_stream import _native
from reap_stream.scoring.halves import HALVES
from reap_stream.scoring.saliency import MAXIMA, SUMS, LayerStats

_NATIVE_TAGS: Final[dict[torch.dtype, Literal["bf16", "f16", "f32"]]] = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
}
_FIELDS = ("gate_sum", "norm_sum", "gate_norm_sum", *MAXIMA)


class SaliencyAccumulator:
    """Adds up gate weights and output norms of each expert and calibration source.

    Args:
        num_experts: experts of the layer.
        num_sources: calibration sources.
        device: where the expert outputs are.
    """

    def __init__(self, num_experts: int, num_sources: int, device: torch.device) -> None:
        self._shape = (num_experts, HALVES * num_sources)
        self._tokens = np.zeros(self._shape, dtype=np.int64)
        self._sums = {name: np.zeros(self._shape) for name in _FIELDS}
        self._non_finite = 0
        self._on_device = device.type != "cpu"
        if self._on_device:
            self._make_cells(device)

    def add(
        self,
        experts: int | torch.Tensor,
        rows: torch.Tensor,
        gates: torch.Tensor,
        sources: torch.Tensor,
    ) -> None:
        """Adds expert outputs; rows whose norm is not finite are counted and left out.

        Args:
            experts: the expert of all rows, or int64 [n].
            rows: [n, hidden] outputs before the gate weight.
            gates: float32 [n].
            sources: int32 [n], `HALVES` * the row's source + its half; see `row_shares`.
        """
        tag = _NATIVE_TAGS.get(rows.dtype)
        if self._on_device or not isinstance(experts, int) or tag is None:
            self._add_cells(experts, rows, gates, sources)
            return
        self._non_finite += _native.saliency(
            rows.contiguous().view(torch.uint8).numpy(),
            tag,
            gates.contiguous().numpy(),
            sources.contiguous().numpy(),
            self._tokens[experts],
            self._sums["gate_sum"][experts],
            self._sums["norm_sum"][experts],
            self._sums["gate_norm_sum"][experts],
            self._sums["norm_max"][experts],
            self._sums["output_max"][experts],
            rows.shape[1],
            threads=torch.get_num_threads(),
        )

    def _add_cells(
        self,
        experts: int | torch.Tensor,
        rows: torch.Tensor,
        gates: torch.Tensor,
        sources: torch.Tensor,
    ) -> None:
        norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).double()
        finite = torch.isfinite(norms)
        norms = torch.where(finite, norms, 0.0)
        gate = torch.where(finite, gates.double(), 0.0)
        # What is not finite goes to one cell past the last, which counts it.
        last = self._shape[0] * self._shape[1]
        cell = torch.where(finite, experts * self._shape[1] + sources.long(), last)
        counts, cells = self._device_cells(rows.device)
        counts.index_add_(0, cell, torch.ones_like(cell))
        cells["gate_sum"].index_add_(0, cell, gate)
        cells["norm_sum"].index_add_(0, cell, norms)
        cells["gate_norm_sum"].index_add_(0, cell, gate * norms)
        cells["norm_max"].scatter_reduce_(0, cell, norms, "amax")
        largest = torch.linalg.vector_norm(rows, float("inf"), dim=-1).double()
        largest = torch.where(finite, largest, 0.0)
        cells["output_max"].scatter_reduce_(0, cell, largest, "amax")

    def _device_cells(self, device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if not self._on_device:
            self._make_cells(device)
            self._on_device = True
        return self._counts, self._cells

    def _make_cells(self, device: torch.device) -> None:
        cells = self._shape[0] * self._shape[1] + 1
        self._cells = {
            name: torch.zeros(cells, dtype=torch.float64, device=device) for name in _FIELDS
        }
        self._counts = torch.zeros(cells, dtype=torch.int64, device=device)

    def finish(self) -> tuple[LayerStats, int]:
        """The sums, and how many outputs were not finite.

        Returns:
            Statistics of shape [sources, experts], and the count.
        """
        found: dict[str, np.ndarray[Any, Any]] = {"tokens": self._tokens, **self._sums}
        lost = self._non_finite
        if self._on_device:
            counts = self._counts.cpu().numpy()
            lost += int(counts[-1])
            found["tokens"] = found["tokens"] + counts[:-1].reshape(self._shape)
            for name in _FIELDS:
                both = found[name], self._cells[name][:-1].cpu().numpy().reshape(self._shape)
                found[name] = np.maximum(*both) if name in MAXIMA else np.add(*both)
        return LayerStats.of_arrays(_by_source(found)), lost


def _by_source(found: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """From [experts, sources × halves] to the arrays of `LayerStats`, [sources, experts]."""
    arrays = {}
    for name, values in found.items():
        even, odd = (np.ascontiguousarray(values[:, half::HALVES].T) for half in range(HALVES))
        arrays[name] = np.maximum(even, odd) if name in MAXIMA else even + odd
        if name in SUMS:
            arrays[f"odd.{name}"] = odd
    return arrays
