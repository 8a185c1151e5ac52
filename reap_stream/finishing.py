"""The ends of a job: taking it up, and putting its result in its place."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from reap_stream.auditing import audit
from reap_stream.calibration_record import score_metadata
from reap_stream.card.privacy import of_run
from reap_stream.card.records import relabelled
from reap_stream.card.writing import card_documents
from reap_stream.checkpoint.job import (
    check_new_job,
    check_output_path,
    stored_settings,
)
from reap_stream.checkpoint.publish import publish
from reap_stream.choice_record import choice_findings
from reap_stream.errors import OutputError
from reap_stream.model.opened import OpenedModel
from reap_stream.outputs import PrunedOutputs
from reap_stream.pruning import RUN_FILE, SCORES_FILE, Variant
from reap_stream.ranks.agreement import check_same
from reap_stream.ranks.base import ALONE, Ranks
from reap_stream.records import DECIDING, Summary, summarize, unreached_experts, versions
from reap_stream.scoring.saliency import LayerStats
from reap_stream.scoring.scores_file import save_scores
from reap_stream.settings import OutputSettings
from reap_stream.shared_job import SharedJob, open_shared

# Settings that may differ when a job is resumed: they do not decide a byte of the result.
FREE_SETTINGS = frozenset({"memory", "model", "overwrite"})


class Finished(Protocol):
    """What knows of finished layers.

    Attributes:
        done: layer → statistics; None in a layer without routed experts.
        non_finite: layer → expert outputs left out of the statistics.
    """

    done: dict[int, LayerStats | None]
    non_finite: dict[int, int]


def findings(finished: Finished) -> dict[str, Any]:
    """The part of run.json that the pass found out."""
    lost = {str(layer): count for layer, count in finished.non_finite.items() if count}
    return {
        "unreached_experts": unreached_experts(finished.done),
        "non_finite_outputs": lost,
    }


def writing_findings(outputs: PrunedOutputs, variants: Sequence[Variant]) -> dict[str, Any]:
    """`findings` of a job that chose experts, and what is to say of the choice."""
    keeps = [variant.target.keep for variant in variants]
    return {**findings(outputs), **choice_findings(outputs.chooser, outputs.stored, keeps)}


def open_job(
    path: Path, settings: Mapping[str, Any], output: OutputSettings, ranks: Ranks = ALONE
) -> SharedJob:
    """The job of an output: a new one, or the half-done one that `--resume` asks for.

    Raises:
        UsageError: the ranks are about to do different jobs.
        ReapStreamError: as `open_shared`.
    """
    same = {key: value for key, value in settings.items() if key not in FREE_SETTINGS}
    check_same(ranks, {**same, "versions": {name: versions()[name] for name in DECIDING}})
    if output.resume:
        return open_shared(path, settings, ranks, resume_with=FREE_SETTINGS)
    settings = {**settings, "overwrite": output.overwrite}
    return open_shared(path, settings, ranks, overwrite=output.overwrite)


def check_job(path: Path, source: Path, output: OutputSettings) -> None:
    """Refuses an output that could not be written, before anything is opened.

    Raises:
        UsageError: it would touch the source, or is there already.
    """
    check_output_path(path, source)
    if not output.resume:
        check_new_job(path, overwrite=output.overwrite)


def publish_outputs(
    model: OpenedModel,
    outputs: PrunedOutputs,
    job: SharedJob,
    summary: Summary,
    output: OutputSettings,
) -> None:
    """Lets rank 0 write what stands beside the shards and put the result in its place."""
    job.leave()
    job.ranks.by_first(lambda: _publish(model, outputs, job, summary, output))


def _publish(
    model: OpenedModel,
    outputs: PrunedOutputs,
    job: SharedJob,
    summary: Summary,
    output: OutputSettings,
) -> None:
    assert job.own is not None
    outputs.check_complete()
    scores_path = job.path("scores.safetensors")
    # Others will read what is written from here on.
    shorten = of_run(summary.details)
    summary = replace(summary, details=shorten.document(summary.details))
    save_scores(scores_path, relabelled(outputs.scores(_score_metadata(summary)), shorten))

    def documents(variant: Variant) -> dict[str, bytes]:
        return {
            SCORES_FILE: scores_path.read_bytes(),
            RUN_FILE: summary.document(),
            **card_documents(model, variant, summary),
        }

    outputs.write_documents(documents, output.mtp)
    outputs.committer.drain()
    _check_written(model, outputs)
    # A resumed job replaces what it was begun to replace.
    begun = stored_settings(output.output) or {}
    publish(job.own, overwrite=output.overwrite or bool(begun.get("overwrite")))
    job.discard()


def _check_written(model: OpenedModel, outputs: PrunedOutputs) -> None:
    """Audits every checkpoint as an engine would read it, while nothing is in its place yet.

    Raises:
        OutputError: one of them has faults that its source has not.
    """
    for directory in outputs.directories:
        faults = audit(directory, model)
        if faults:
            lines = "".join(f"\n  {fault}" for fault in faults)
            message = (
                f"{directory}: what was written does not pass the audit and is not published; "
                f"this is a fault of the writer or the disk: report it, keep the files{lines}"
            )
            raise OutputError(message)


def _score_metadata(summary: Summary) -> dict[str, str]:
    calibration, settings = summary.details["calibration"], summary.details["settings"]
    return score_metadata(calibration, settings.get("propagate", calibration.get("propagate")))


def clean_up(job: SharedJob, started: float) -> Summary:
    """An earlier run was stopped between publishing its result and tidying up."""
    if job.own is not None:
        publish(job.own)
    job.discard()
    return summarize(
        seconds=time.monotonic() - started, read_nbytes=0, written_nbytes=0, details={}
    )
