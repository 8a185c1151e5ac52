"""Scores without a checkpoint: what `observe` does with finished layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from reap_stream.checkpoint.job import Job
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.scoring.saliency import LayerStats, Scores
from reap_stream.scoring.scores_file import load_scores, save_scores


class ScoreSink:
    """Keeps the statistics of finished layers, a file each, until the pass is done.

    Args:
        job: where they are kept.
        sources: labels of the calibration sources.
        num_experts: experts of each layer.
        fingerprint: of the source.
    """

    def __init__(
        self, job: Job, sources: tuple[str, ...], num_experts: int, fingerprint: str
    ) -> None:
        self._job = job
        self._sources = sources
        self._num_experts = num_experts
        self._fingerprint = fingerprint
        self.done: dict[int, LayerStats | None] = {}
        self.non_finite: dict[int, int] = {}
        for entry in job.entries:
            index = int(entry["layer"])
            self.non_finite[index] = int(entry["non_finite"])
            path = job.path("layers", f"{index}.safetensors")
            self.done[index] = load_scores(path).layers[index] if entry["scored"] else None

    def is_done(self, index: int) -> bool:
        """Whether the layer's statistics are on the disk."""
        return index in self.done

    def take(self, ref: TensorRef, raw: np.ndarray[Any, Any]) -> None:
        """Nothing is written of the weights."""

    def finish(
        self,
        index: int,
        stats: LayerStats | None,
        resident: Callable[[TensorRef], np.ndarray[Any, Any] | None],
        non_finite: int = 0,
    ) -> None:
        """Saves a layer's statistics and journals it."""
        del resident
        if stats is not None:
            path = self._job.path("layers", f"{index}.safetensors")
            save_scores(path, self._scores({index: stats}, {}))
        entry = {"layer": index, "scored": stats is not None, "non_finite": non_finite}
        self._job.append({"step": "layer", **entry})
        self.done[index] = stats
        self.non_finite[index] = non_finite

    def kept(self, index: int) -> tuple[int, ...]:
        """Observing chooses nothing."""
        raise AssertionError(index)

    def drain(self) -> None:
        """Finished layers are on the disk already."""

    def scores(self, metadata: Mapping[str, str]) -> Scores:
        """The statistics of all layers."""
        layers = {i: stats for i, stats in sorted(self.done.items()) if stats is not None}
        return self._scores(layers, metadata)

    def _scores(self, layers: dict[int, LayerStats], metadata: Mapping[str, str]) -> Scores:
        return Scores(layers, self._sources, self._num_experts, self._fingerprint, dict(metadata))
