"""The jobs that run the model: prune and observe. Nothing clever.

prune is observe and compact in one reading of the source: each layer is read, run, scored, and
its kept experts are written from the bytes that are in memory anyway.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from reap_stream.calibration.dealing import dealt_tokens
from reap_stream.calibration_record import score_metadata
from reap_stream.checkpoint.job import stored_settings
from reap_stream.checkpoint.reader import Reader
from reap_stream.download import check_download
from reap_stream.errors import UsageError
from reap_stream.finishing import (
    check_job,
    clean_up,
    findings,
    open_job,
    publish_outputs,
    writing_findings,
)
from reap_stream.forward import ForwardPass
from reap_stream.layer_pass import LayerPass
from reap_stream.model.architecture import Architecture
from reap_stream.model.opened import OpenedModel
from reap_stream.mtp_choice import MtpChoice, choose_mtp, choose_observed_mtp
from reap_stream.observing import ScoreSink
from reap_stream.outputs import PrunedOutputs
from reap_stream.planned_output import PlannedOutput
from reap_stream.preparation import Preparation, prepare_run, reduced_architecture
from reap_stream.progress import Progress
from reap_stream.pruning import Variant, model_chooser
from reap_stream.ranks.base import ALONE, Ranks
from reap_stream.records import (
    Summary,
    calibration_details,
    run_details,
    summarize,
)
from reap_stream.scoring.saliency import Scores
from reap_stream.scoring.scores_file import check_scores_file, save_scores
from reap_stream.serving import serving_record
from reap_stream.settings import OutputSettings, RunSettings
from reap_stream.shard_order import shard_order
from reap_stream.shared_job import SharedJob
from reap_stream.snapshots import Snapshots


def prune(run: RunSettings, output: OutputSettings, ranks: Ranks = ALONE) -> Summary:
    """Scores a model's experts on calibration data and writes it without the lowest.

    Args:
        run: the model, the data, and how it is run.
        output: the targets and where they are written.
        ranks: the processes that do it together, each calling this.

    Raises:
        ReapStreamError: see its children; whatever goes wrong, an existing output stays whole.
    """
    started = time.monotonic()
    check_job(output.output, run.model, output)
    planned = PlannedOutput(output, run.propagate)
    ready = prepare_run(
        _same_batches(run, output.output, resume=output.resume),
        lambda model, device: choose_mtp(model, output.mtp, device),
        planned.plan,
        ranks,
    )
    output, variants = planned.settings, planned.variants
    chooser = model_chooser(ready.model, ready.corpus.sources, run.choice)
    settings = {**ready.job_settings(), **output.record()}
    with ExitStack() as stack:
        reader = stack.enter_context(Reader())
        job = stack.enter_context(open_job(output.output, settings, output, ranks))
        if job.is_published:
            return clean_up(job, started)
        outputs = PrunedOutputs(
            ready.model, variants, job, ready.corpus.sources, chooser, ready.mtp.kind
        )
        stack.enter_context(outputs.committer)
        snapshots = Snapshots(job.path("hidden"), output.snapshot_seconds, ranks)
        forward = _forward(stack, ready, reader, job)
        reduced = _Reduced(ready, variants[0]) if run.propagate == "pruned" else None
        layers = LayerPass(ready, forward, outputs, snapshots, reduced)
        layers.run(planned.order.done)
        forward.states.close()
        outputs.finish_rest()
        details = {
            **run_details(ready, settings),
            **writing_findings(outputs, variants),
            "weights": dict(ready.model.change.counts),
            "serving": serving_record(ready.model, variants, outputs.choices),
            "stages": asdict(forward.times),
        }
        summary = summarize(
            seconds=time.monotonic() - started,
            read_nbytes=reader.bytes_read + outputs.copied_nbytes,
            written_nbytes=outputs.written_nbytes,
            details=details,
            ranks=ranks,
            tokens=dealt_tokens(ready.batches),
        )
        publish_outputs(ready.model, outputs, job, summary, output)
    return summary


def observe(
    run: RunSettings,
    scores_path: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    snapshot_seconds: float = 300.0,
    ranks: Ranks = ALONE,
) -> Summary:
    """Scores a model's experts and writes the scores alone.

    Args:
        run: the model, the data, and how it is run.
        scores_path: the file to write.
        overwrite: replace an existing file.
        resume: go on with a half-done run.
        snapshot_seconds: least time between two snapshots of the hidden states.
        ranks: the processes that do it together, each calling this.

    Raises:
        ReapStreamError: see its children.
    """
    started = time.monotonic()
    if run.propagate == "pruned":
        message = "--propagate pruned needs a target to prune to, and observe has none"
        raise UsageError(message)
    output = OutputSettings(
        output=scores_path,
        overwrite=overwrite,
        resume=resume,
        snapshot_seconds=snapshot_seconds,
    )
    check_job(scores_path, run.model, output)
    check_scores_file(scores_path)

    def checked(model: OpenedModel, mtp: MtpChoice) -> OpenedModel:
        check_download(model, shard_order(model, mtp.head, writes=False), scores_path)
        return model

    run = _same_batches(run, scores_path, resume=resume)
    ready = prepare_run(run, choose_observed_mtp, checked, ranks)
    order = shard_order(ready.model, ready.mtp.head, writes=False)
    settings = {**ready.job_settings(), "mtp": ready.mtp.kind}
    with ExitStack() as stack:
        reader = stack.enter_context(Reader())
        job = stack.enter_context(open_job(scores_path, settings, output, ranks))
        sink = ScoreSink(job, ready.model, ready.corpus.sources)
        snapshots = Snapshots(job.path("hidden"), output.snapshot_seconds, ranks)
        forward = _forward(stack, ready, reader, job)
        LayerPass(ready, forward, sink, snapshots).run(order.done)
        forward.states.close()
        written_nbytes = _save(job, scores_path, sink.scores(_score_metadata(ready)))
        details = {**run_details(ready, settings), **findings(sink)}
        summary = summarize(
            seconds=time.monotonic() - started,
            read_nbytes=reader.bytes_read,
            written_nbytes=written_nbytes,
            details=details,
            ranks=ranks,
            tokens=dealt_tokens(ready.batches),
        )
        job.leave()
        job.discard()
    return summary


def _same_batches(run: RunSettings, output: Path, *, resume: bool) -> RunSettings:
    """On resume, batches as they were: other batches round differently in the last bits."""
    if not resume or run.batch_tokens is not None:
        return run
    return replace(run, batch_tokens=(stored_settings(output) or {}).get("batch_tokens"))


def _save(job: SharedJob, path: Path, scores: Scores) -> int:
    """Saves scores, which rank 0 does for all; the bytes that this rank wrote."""
    if not job.leads:
        return 0
    save_scores(path, scores)
    return path.stat().st_size


def _forward(stack: ExitStack, ready: Preparation, reader: Reader, job: SharedJob) -> ForwardPass:
    progress = stack.enter_context(
        Progress(
            ready.num_layers,
            dealt_tokens(ready.batches),
            lambda: reader.bytes_read,
            shown=ready.run.progress,
        )
    )
    spill = job.path("hidden", f"states-{job.ranks.rank}")
    # Left by a run that was killed before the file lost its name.
    spill.unlink(missing_ok=True)
    forward = ForwardPass(ready, reader, spill_path=spill, progress=progress)
    return stack.enter_context(forward)


class _Reduced:
    """Gives a layer's architecture with as many experts as a target keeps."""

    def __init__(self, ready: Preparation, variant: Variant) -> None:
        self._decoder = reduced_architecture(ready.model, variant.target.keep, ready.device)
        head = ready.mtp.head
        self._mtp = None if head is None else head.reduced(self._decoder)

    def __call__(self, layer: int) -> Architecture:
        decoder = layer < self._decoder.num_layers
        return self._decoder if decoder or self._mtp is None else self._mtp


def _score_metadata(ready: Preparation) -> dict[str, str]:
    return score_metadata(calibration_details(ready.corpus), ready.run.propagate)
