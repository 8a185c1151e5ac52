"""Running sums of what the experts of one layer did, in float64, by calibration source.

On the CPU the extension sums straight from the outputs; on other devices torch does, and the sums
stay there until the layer is done, so that no batch waits for them.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import torch

from reap_stream import _native
from reap_stream.scoring.saliency import LayerStats

_NATIVE_TAGS: Final[dict[torch.dtype, Literal["bf16", "f16", "f32"]]] = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
}
_FIELDS = ("gate_sum", "norm_sum", "gate_norm_sum", "norm_max")


class SaliencyAccumulator:
    """Adds up gate weights and output norms of each expert and calibration source.

    Args:
        num_experts: experts of the layer.
        num_sources: calibration sources.
        device: where the expert outputs are.
    """

    def __init__(self, num_experts: int, num_sources: int, device: torch.device) -> None:
        self._shape = (num_experts, num_sources)
        self._tokens = np.zeros(self._shape, dtype=np.int64)
        self._sums = {name: np.zeros(self._shape) for name in _FIELDS}
        self._non_finite = 0
        self._on_device = device.type != "cpu"
        if self._on_device:
            cells = num_experts * num_sources + 1
            self._cells = {
                name: torch.zeros(cells, dtype=torch.float64, device=device) for name in _FIELDS
            }
            self._counts = torch.zeros(cells, dtype=torch.int64, device=device)

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
            sources: int32 [n].
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

    def _device_cells(self, device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if not self._on_device:
            cells = self._shape[0] * self._shape[1] + 1
            self._cells = {
                name: torch.zeros(cells, dtype=torch.float64, device=device) for name in _FIELDS
            }
            self._counts = torch.zeros(cells, dtype=torch.int64, device=device)
            self._on_device = True
        return self._counts, self._cells

    def finish(self) -> tuple[LayerStats, int]:
        """The sums, and how many outputs were not finite.

        Returns:
            Statistics of shape [sources, experts], and the count.
        """
        tokens, sums, lost = self._tokens, self._sums, self._non_finite
        if self._on_device:
            counts = self._counts.cpu().numpy()
            lost += int(counts[-1])
            tokens = tokens + counts[:-1].reshape(self._shape)
            cells = {name: self._cells[name][:-1].cpu().numpy() for name in _FIELDS}
            both = {name: cells[name].reshape(self._shape) for name in _FIELDS}
            sums = {name: sums[name] + both[name] for name in _FIELDS if name != "norm_max"}
            sums["norm_max"] = np.maximum(self._sums["norm_max"], both["norm_max"])
        by_source = {name: np.ascontiguousarray(values.T) for name, values in sums.items()}
        return LayerStats(tokens=np.ascontiguousarray(tokens.T), **by_source), lost
