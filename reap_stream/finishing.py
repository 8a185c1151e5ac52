"""The ends of a job: taking it up, and putting its result in its place."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from reap_stream.auditing import audit
from reap_stream.card.writing import card_documents
from reap_stream.checkpoint.job import (
    Job,
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
from reap_stream.records import Summary, summarize, unreached_experts
from reap_stream.scoring.saliency import LayerStats
from reap_stream.scoring.scores_file import save_scores
from reap_stream.settings import OutputSettings

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


def open_job(path: Path, settings: Mapping[str, Any], output: OutputSettings) -> Job:
    """The job of an output: a new one, or the half-done one that `--resume` asks for."""
    if output.resume:
        return Job.resume(path, settings, FREE_SETTINGS)
    settings = {**settings, "overwrite": output.overwrite}
    return Job.create(path, settings, overwrite=output.overwrite)


def check_job(path: Path, source: Path, output: OutputSettings) -> None:
    """Refuses an output that could not be written, before anything is opened.

    Raises:
        UsageError: it would touch the source, or is there already.
    """
    check_output_path(path, source)
    if not output.resume:
        check_new_job(path, overwrite=output.overwrite)


def publish_outputs(
    model: OpenedModel, outputs: PrunedOutputs, job: Job, summary: Summary, output: OutputSettings
) -> None:
    """Writes what stands beside the shards, then puts the result in its place."""
    outputs.check_complete()
    scores_path = job.path("scores.safetensors")
    save_scores(scores_path, outputs.scores(_score_metadata(summary)))

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
    publish(job, overwrite=output.overwrite or bool(begun.get("overwrite")))
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
    found = {
        "calibration_sha256": calibration.get("sha256", calibration.get("calibration_sha256")),
        "tokens": calibration.get("tokens"),
        "propagate": settings.get("propagate", calibration.get("propagate")),
    }
    return {key: str(value) for key, value in found.items() if value is not None}


def clean_up(job: Job, started: float) -> Summary:
    """An earlier run was stopped between publishing its result and tidying up."""
    publish(job)
    job.discard()
    return summarize(
        seconds=time.monotonic() - started, read_nbytes=0, written_nbytes=0, details={}
    )
