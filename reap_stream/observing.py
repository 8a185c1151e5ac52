"""Scores without a checkpoint: what `observe` does with finished layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.model.opened import OpenedModel
from reap_stream.scoring.saliency import LayerStats, Scores
from reap_stream.shared_job import SharedJob
from reap_stream.stored_scores import StoredScores


class ScoreSink:
    """Keeps the statistics of finished layers, a file each, until the pass is done.

    Args:
        job: where they are kept.
        model: the source.
        sources: labels of the calibration sources.
    """

    def __init__(self, job: SharedJob, model: OpenedModel, sources: tuple[str, ...]) -> None:
        self._job = job
        self._stored = StoredScores(job, model, sources)
        self.done = self._stored.done
        self.non_finite = self._stored.non_finite
        for entry in job.entries:
            self._stored.take_up(
                int(entry["layer"]), scored=entry["scored"], non_finite=int(entry["non_finite"])
            )

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
        self._stored.keep(index, stats, non_finite)
        entry = {"layer": index, "scored": stats is not None, "non_finite": non_finite}
        self._job.append({"step": "layer", **entry})

    def kept(self, index: int) -> tuple[int, ...]:
        """Observing chooses nothing."""
        raise AssertionError(index)

    def drain(self) -> None:
        """Finished layers are on the disk already."""

    def scores(self, metadata: Mapping[str, str]) -> Scores:
        """The statistics of all layers."""
        return self._stored.scores(metadata)
