"""The pruned checkpoints of one job while they are written: one for each target.

Tensors come in as the pass reads them. What does not depend on scores is written at once; what
does (experts, router rows) once the layer is scored, or, where some are protected by what all
layers did, after the pass; everything no layer touches at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reap_stream.checkpoint.publish import finish_directory
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.committing import open_committer
from reap_stream.errors import OutputError, UsageError
from reap_stream.kept_record import KEPT_FILE
from reap_stream.model.opened import OpenedModel
from reap_stream.pruning import (
    Kept,
    Variant,
    config_text,
    kept_document,
    open_writers,
    with_mtp,
)
from reap_stream.scoring.choosing import Chooser
from reap_stream.scoring.saliency import LayerStats, Scores
from reap_stream.scoring.scores_file import save_scores
from reap_stream.shared_job import SharedJob
from reap_stream.stored_scores import StoredScores

Resident = Callable[[TensorRef], "np.ndarray[Any, Any] | None"]


class PrunedOutputs:
    """Writes all variants of a job layer by layer, and journals each layer.

    Args:
        model: the source.
        variants: what is to be written.
        job: where it is written until it is published.
        sources: labels of the calibration sources.
        chooser: chooses experts by their statistics; if it does not know yet which are protected,
            experts are written after the last layer, from the source.
        mtp: what happens to next-token-prediction layers.
    """

    def __init__(
        self,
        model: OpenedModel,
        variants: list[Variant],
        job: SharedJob,
        sources: tuple[str, ...],
        chooser: Chooser,
        mtp: str | None = "match",
    ) -> None:
        self.written_nbytes = 0
        self.copied_nbytes = 0
        self._model = model
        self._variants = variants
        self._job = job
        self.chooser = chooser
        self.stored = StoredScores(job, model, sources)
        self.done = self.stored.done
        self.non_finite = self.stored.non_finite
        # A run stopped before its first layer may have stopped while taking room: take it anew.
        self._writers = open_writers(
            model, variants, job.path("out"), job.ranks, resume=bool(job.entries)
        )
        self.committer = open_committer(job, self._writers)
        self._kept: list[Kept] = [{} for _ in variants]
        self._held: dict[str, np.ndarray[Any, Any]] = {}
        self._whole: list[str] = []
        self._whole_done: set[str] = set()
        self._mtp = mtp
        self._rest_done = False
        for entry in job.entries:
            self._take_up(entry)

    def _take_up(self, entry: Mapping[str, Any]) -> None:
        """Learns from a line of the journal what an earlier run finished."""
        if entry["step"] == "rest":
            self._rest_done = True
            return
        index = int(entry["layer"])
        if entry["step"] == "layer":
            self._whole_done.update(entry["whole"])
            self.stored.take_up(index, scored=entry["scored"], non_finite=int(entry["non_finite"]))
        if entry["kept"]:
            for variant, kept in zip(self._variants, self._kept, strict=True):
                kept[index] = tuple(entry["kept"][str(variant.target.keep)])

    def is_done(self, index: int) -> bool:
        """Whether the layer is written."""
        return index in self.done

    def kept(self, index: int) -> tuple[int, ...]:
        """The kept experts of a finished layer in the first variant."""
        return self._kept[0][index]

    @property
    def choices(self) -> list[Kept]:
        """The kept experts of every finished layer, for each variant."""
        return self._kept

    @property
    def directories(self) -> list[Path]:
        """Where each variant is being written."""
        return [writer.directory for writer in self._writers]

    def drain(self) -> None:
        """Waits until finished layers are on the disk."""
        self.committer.drain()

    def take(self, ref: TensorRef, raw: np.ndarray[Any, Any]) -> None:
        """Is shown a dense tensor's bytes: writes it, or keeps it until the layer is scored."""
        role = self._model.tensor_map.roles[ref.name]
        self._held[ref.name] = raw
        if role.layer is not None:
            return
        needed = {ref.name}
        if role.recipe is not None:
            steps = role.recipe.steps(())
            needed = {span.ref.name for step in steps for span in step.spans}
        if needed <= self._held.keys():
            self.write_whole(ref.name if role.recipe is None else role.recipe.place)
            for name in needed:
                del self._held[name]

    def write_whole(self, *origins: str) -> None:
        """Writes what comes from tensors on which no choice of experts bears.

        Args:
            origins: names of the source's tensors; each is copied from its file, unless `take` was
                shown it.
        """
        for writer in self._writers:
            outs = [out for origin in origins for out in writer.from_origin(origin)]
            self._count(writer.write(outs, {}, self._resident))
        self._whole.extend(origins)

    def _resident(self, ref: TensorRef) -> np.ndarray[Any, Any] | None:
        return self._held.get(ref.name)

    def _count(self, written: tuple[int, int]) -> None:
        self.written_nbytes += written[0]
        self.copied_nbytes += written[1]

    def finish(
        self, index: int, stats: LayerStats | None, resident: Resident, non_finite: int = 0
    ) -> None:
        """Chooses the experts of a scored layer for each variant, writes and journals them.

        Args:
            index: the layer.
            stats: what its experts did; None in a layer without.
            resident: gives bytes that are in memory, None for others.
            non_finite: expert outputs that were left out of `stats`.
        """
        self.stored.keep(index, stats, non_finite)
        kept = {}
        if stats is not None and self.chooser.protected is not None:
            kept = self._write_experts(index, stats, resident)
        self._held.clear()
        self._whole_done.update(self._whole)
        entry = {"kept": kept, "whole": self._whole, "non_finite": non_finite}
        self.committer.commit(
            {"step": "layer", "layer": index, "scored": stats is not None, **entry}
        )
        self._whole = []

    def _write_experts(
        self, index: int, stats: LayerStats, resident: Resident
    ) -> dict[str, list[int]]:
        def bytes_of(ref: TensorRef) -> np.ndarray[Any, Any] | None:
            held = self._held.get(ref.name)
            return resident(ref) if held is None else held

        entry: dict[str, list[int]] = {}
        for variant, writer, kept in zip(self._variants, self._writers, self._kept, strict=True):
            kept[index] = self.chooser.choose(index, stats, variant.target.keep)
            entry[str(variant.target.keep)] = list(kept[index])
            self._count(writer.write_layer(index, kept, bytes_of))
        return entry

    def finish_experts(self) -> None:
        """Writes the experts of layers whose choice had to wait for all of them.

        Raises:
            UsageError: more experts are protected than there are places.
        """
        if self.chooser.protected is not None:
            return
        layers = self.stored.layers
        self.chooser = self.chooser.knowing(layers)
        for variant in self._variants:
            self._check_places(variant.target.keep)
        for index, stats in layers.items():
            if index not in self._kept[0]:
                kept = self._write_experts(index, stats, lambda _: None)
                self.committer.commit({"step": "experts", "layer": index, "kept": kept})

    def _check_places(self, keep: int) -> None:
        try:
            self.chooser.check(self._model.architecture.num_experts, keep)
        except UsageError as error:
            # The pass is done: what it found must not be lost to a target that cannot be met.
            path = self._job.path("scores.safetensors")
            if self._job.leads:
                save_scores(path, self.stored.scores({}))
            message = f"{error} (the scores are in {path}: give them to reap-stream compact)"
            raise UsageError(message) from error

    def finish_rest(self) -> None:
        """Writes what no layer of the pass touched: embeddings, head, MTP layers, other parts."""
        self.finish_experts()
        if self._rest_done:
            return
        mtp = self._model.mtp_kept_layers()
        for writer, kept in zip(self._writers, self._kept, strict=True):
            outs = [
                out
                for out in writer.plan.tensors.values()
                if (out.layer is None and out.origin not in self._whole_done)
                or (out.layer in mtp and out.layer not in kept)
            ]
            chosen = with_mtp(self._model, kept, self._mtp)
            self._count(writer.write(outs, chosen, lambda _: None))
        self.committer.commit({"step": "rest"})
        self.committer.drain()
        self._rest_done = True

    def check_complete(self) -> None:
        """Makes sure that every byte was written before anything is published.

        Raises:
            OutputError: a layer or the rest is not; a defect of this package.
        """
        scored = self._model.mtp_kept_layers() if self._mtp == "score" else ()
        wanted = [*self._model.architecture.moe_layers, *scored]
        missing = [index for index in wanted if any(index not in kept for kept in self._kept)]
        if missing or not self._rest_done:
            message = (
                f"{self._job.directory}: layers {missing} were not written, nothing is published; "
                "--overwrite to start anew"
            )
            raise OutputError(message)

    def scores(self, metadata: Mapping[str, str]) -> Scores:
        """The statistics of all layers."""
        return self.stored.scores(metadata)

    def write_documents(
        self, documents: Callable[[Variant], Mapping[str, bytes]], mtp: str | None
    ) -> None:
        """Writes everything beside the shards, for each variant.

        Args:
            documents: further files of a variant by relative path.
            mtp: what happened to next-token-prediction layers.
        """
        for variant, writer, chosen in zip(self._variants, self._writers, self._kept, strict=True):
            kept = with_mtp(self._model, chosen, mtp)
            finish_directory(
                writer.directory,
                variant.plan,
                self._model.change.seen_on(self._model.checkpoint),
                kept,
                config_text(self._model, kept, variant.target.keep, mtp),
                {KEPT_FILE: kept_document(self._model, kept), **documents(variant)},
            )
