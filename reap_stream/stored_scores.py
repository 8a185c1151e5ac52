"""The statistics of a job's finished layers: in memory, and a file each until the job is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from reap_stream.model.opened import OpenedModel
from reap_stream.scoring.saliency import LayerStats, Scores
from reap_stream.scoring.scores_file import load_scores, save_scores
from reap_stream.shared_job import SharedJob

TAKEN_ON = "taken_on"
"""Metadata of scores: id and commit of the model, where it came from the Hub."""


class StoredScores:
    """Keeps what layers did.

    Args:
        job: where the files are.
        model: the source.
        sources: labels of the calibration sources.

    Attributes:
        done: layer → statistics; None in a layer without routed experts.
        non_finite: layer → expert outputs left out of the statistics.
    """

    def __init__(self, job: SharedJob, model: OpenedModel, sources: tuple[str, ...]) -> None:
        self.done: dict[int, LayerStats | None] = {}
        self.non_finite: dict[int, int] = {}
        self.sources = sources
        self._job = job
        self._num_experts = model.architecture.num_experts
        self._fingerprint = model.checkpoint.fingerprint
        origin = model.checkpoint.origin
        self._taken_on = {} if origin is None else {TAKEN_ON: str(origin)}

    @property
    def layers(self) -> dict[int, LayerStats]:
        """The statistics of every layer that has routed experts."""
        return {i: stats for i, stats in sorted(self.done.items()) if stats is not None}

    def keep(self, index: int, stats: LayerStats | None, non_finite: int) -> None:
        """Takes a layer's statistics; they are on the disk before the layer is journaled."""
        if stats is not None and self._job.leads:
            save_scores(self._path(index), self._scores({index: stats}, {}))
        self.done[index] = stats
        self.non_finite[index] = non_finite

    def take_up(self, index: int, *, scored: bool, non_finite: int) -> None:
        """Learns of a layer that an earlier run finished."""
        self.done[index] = load_scores(self._path(index)).layers[index] if scored else None
        self.non_finite[index] = non_finite

    def scores(self, metadata: Mapping[str, str]) -> Scores:
        """The statistics of all layers."""
        return self._scores(self.layers, metadata)

    def _scores(self, layers: dict[int, LayerStats], metadata: Mapping[str, str]) -> Scores:
        known = {**self._taken_on, **metadata}
        return Scores(layers, self.sources, self._num_experts, self._fingerprint, known)

    def _path(self, index: int) -> Path:
        return self._job.path("layers", f"{index}.safetensors")
