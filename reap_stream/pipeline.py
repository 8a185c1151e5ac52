"""The jobs: prune, observe, compact. Loops over layers, nothing clever.

prune is observe and compact in one reading of the source: each layer is read, run, scored, and
its kept experts are written from the bytes that are in memory anyway.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from reap_stream.card import render_card
from reap_stream.checkpoint.job import Job, check_output_path, stored_settings
from reap_stream.checkpoint.publish import publish
from reap_stream.checkpoint.reader import Reader
from reap_stream.errors import UsageError
from reap_stream.forward import ForwardPass
from reap_stream.layer_pass import LayerPass, Snapshots
from reap_stream.model.architecture import Architecture, read_architecture, with_expert_count
from reap_stream.model.opened import OpenedModel, open_model
from reap_stream.model.transformers_api import materialize_buffers
from reap_stream.observing import ScoreSink
from reap_stream.outputs import PrunedOutputs
from reap_stream.preparation import Preparation, prepare_run
from reap_stream.progress import Progress
from reap_stream.pruning import (
    RUN_FILE,
    SCORES_FILE,
    Kept,
    Variant,
    check_config,
    plan_variants,
    read_targets,
)
from reap_stream.records import (
    Summary,
    run_details,
    source_record,
    summarize,
    unreached_experts,
    versions,
)
from reap_stream.scoring.saliency import Scores
from reap_stream.scoring.scores_file import load_scores, save_scores
from reap_stream.settings import ChoiceSettings, OutputSettings, RunSettings

# Settings that may differ when a job is resumed: they do not decide a byte of the result.
FREE_SETTINGS = frozenset({"memory", "model"})


def prune(run: RunSettings, output: OutputSettings) -> Summary:
    """Scores a model's experts on calibration data and writes it without the lowest.

    Args:
        run: the model, the data, and how it is run.
        output: the targets and where they are written.

    Raises:
        ReapStreamError: see its children; whatever goes wrong, an existing output stays whole.
    """
    started = time.monotonic()
    check_output_path(output.output, run.model)
    ready = prepare_run(_same_batches(run, output.output, resume=output.resume))
    variants = plan_variants(ready.model, read_targets(ready.model, output), output)
    if run.propagate == "pruned" and len(variants) > 1:
        message = (
            "--propagate pruned runs later layers on pruned ones, so each target needs a pass of "
            "its own: give one target at a time"
        )
        raise UsageError(message)
    check_config(ready.model, variants, output.mtp)
    settings = {**ready.job_settings(), **output.record()}
    with ExitStack() as stack:
        reader = stack.enter_context(Reader())
        job = stack.enter_context(open_job(output.output, settings, output))
        if job.is_published:
            return _clean_up(job, started)
        outputs = PrunedOutputs(ready.model, variants, job, ready.corpus.sources, ready.run.choice)
        stack.enter_context(outputs.committer)
        snapshots = Snapshots(job.path("hidden"), output.snapshot_seconds)
        forward = _forward(stack, ready, reader, job)
        reduced = _reduced(ready, variants[0]) if run.propagate == "pruned" else None
        layers = LayerPass(ready, forward, outputs, snapshots, reduced)
        layers.run()
        outputs.finish_rest()
        details = {
            **run_details(ready, settings),
            **_findings(outputs.done, layers.non_finite),
            "stages": asdict(forward.times),
        }
        summary = summarize(
            seconds=time.monotonic() - started,
            read_nbytes=reader.bytes_read + outputs.copied_nbytes,
            written_nbytes=outputs.written_nbytes,
            details=details,
        )
        _publish(ready.model, outputs, job, summary, output)
    return summary


def observe(
    run: RunSettings,
    scores_path: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    snapshot_seconds: float = 300.0,
) -> Summary:
    """Scores a model's experts and writes the scores alone.

    Args:
        run: the model, the data, and how it is run.
        scores_path: the file to write.
        overwrite: replace an existing file.
        resume: go on with a half-done run.
        snapshot_seconds: least time between two snapshots of the hidden states.

    Raises:
        ReapStreamError: see its children.
    """
    started = time.monotonic()
    if run.propagate == "pruned":
        message = "--propagate pruned needs a target to prune to, and observe has none"
        raise UsageError(message)
    ready = prepare_run(_same_batches(run, scores_path, resume=resume))
    settings = ready.job_settings()
    output = OutputSettings(
        output=scores_path,
        overwrite=overwrite,
        resume=resume,
        snapshot_seconds=snapshot_seconds,
    )
    with ExitStack() as stack:
        reader = stack.enter_context(Reader())
        job = stack.enter_context(open_job(scores_path, settings, output))
        architecture = ready.model.architecture
        sink = ScoreSink(
            job, ready.corpus.sources, architecture.num_experts, ready.model.checkpoint.fingerprint
        )
        snapshots = Snapshots(job.path("hidden"), output.snapshot_seconds)
        layers = LayerPass(ready, _forward(stack, ready, reader, job), sink, snapshots)
        layers.run()
        save_scores(scores_path, sink.scores(_score_metadata(ready)))
        details = {**run_details(ready, settings), **_findings(sink.done, layers.non_finite)}
        summary = summarize(
            seconds=time.monotonic() - started,
            read_nbytes=reader.bytes_read,
            written_nbytes=scores_path.stat().st_size,
            details=details,
        )
        job.discard()
    return summary


def compact(
    model_path: Path,
    scores_path: Path,
    choice: ChoiceSettings,
    output: OutputSettings,
    *,
    trust_remote_code: bool = False,
) -> Summary:
    """Writes a pruned checkpoint from saved scores, without running the model.

    Args:
        model_path: the checkpoint the scores were taken on.
        scores_path: a file that `observe`, `merge` or `prune` wrote.
        choice: how experts are chosen from the scores.
        output: the targets and where they are written.
        trust_remote_code: let the checkpoint's own code build the model.

    Raises:
        UsageError: the scores are of another model or lack a layer.
        ReapStreamError: see its children.
    """
    started = time.monotonic()
    check_output_path(output.output, model_path)
    model = open_model(model_path, trust_remote_code=trust_remote_code)
    scores = load_scores(scores_path)
    _check_scores(model, scores, scores_path)
    variants = plan_variants(model, read_targets(model, output), output)
    check_config(model, variants, output.mtp)
    settings = {
        **output.record(),
        "method": choice.method,
        "seed": choice.seed,
        "source": model.checkpoint.fingerprint,
        "scores": hashlib.sha256(scores_path.read_bytes()).hexdigest(),
    }
    with ExitStack() as stack:
        job = stack.enter_context(open_job(output.output, settings, output))
        if job.is_published:
            return _clean_up(job, started)
        outputs = PrunedOutputs(model, variants, job, scores.sources, choice)
        stack.enter_context(outputs.committer)
        for index in model.architecture.moe_layers:
            if not outputs.is_done(index):
                outputs.finish(index, scores.layers[index], lambda _: None)
        outputs.finish_rest()
        details = {
            "format_version": 1,
            "versions": versions(),
            "settings": settings,
            "source": source_record(model),
            "calibration": {"sources": list(scores.sources), **scores.metadata},
            **_findings(outputs.done, {}),
        }
        summary = summarize(
            seconds=time.monotonic() - started,
            read_nbytes=outputs.copied_nbytes,
            written_nbytes=outputs.written_nbytes,
            details=details,
        )
        _publish(model, outputs, job, summary, output)
    return summary


def open_job(path: Path, settings: Mapping[str, Any], output: OutputSettings) -> Job:
    """The job of an output: a new one, or the half-done one that `--resume` asks for."""
    if output.resume:
        return Job.resume(path, settings, FREE_SETTINGS)
    return Job.create(path, settings, overwrite=output.overwrite)


def _same_batches(run: RunSettings, output: Path, *, resume: bool) -> RunSettings:
    """On resume, batches as they were: other batches round differently in the last bits."""
    if not resume or run.batch_tokens is not None:
        return run
    return replace(run, batch_tokens=(stored_settings(output) or {}).get("batch_tokens"))


def _forward(stack: ExitStack, ready: Preparation, reader: Reader, job: Job) -> ForwardPass:
    layers = ready.model.architecture.moe_layers[-1] + 1
    progress = stack.enter_context(
        Progress(
            layers,
            ready.corpus.num_tokens,
            lambda: reader.bytes_read,
            shown=ready.run.progress,
        )
    )
    forward = ForwardPass(ready, reader, spill_path=job.path("hidden", "states"), progress=progress)
    return stack.enter_context(forward)


def _reduced(ready: Preparation, variant: Variant) -> Architecture:
    checkpoint, architecture = ready.model.checkpoint, ready.model.architecture
    raw = with_expert_count(checkpoint.config, architecture.count_paths, variant.target.keep)
    reduced = read_architecture(
        checkpoint.directory,
        raw,
        dtype=ready.dtype,
        trust_remote_code=ready.run.trust_remote_code,
    )
    materialize_buffers(reduced.model, ready.device)
    return reduced


def _check_scores(model: OpenedModel, scores: Scores, path: Path) -> None:
    architecture = model.architecture
    if scores.model_fingerprint != model.checkpoint.fingerprint:
        message = (
            f"{path}: these scores were taken on another model (fingerprint "
            f"{scores.model_fingerprint[:12]}…, {model.checkpoint.directory} has "
            f"{model.checkpoint.fingerprint[:12]}…)"
        )
        raise UsageError(message)
    missing = [layer for layer in architecture.moe_layers if layer not in scores.layers]
    if missing or scores.num_experts != architecture.num_experts:
        message = (
            f"{path}: scores of {len(scores.layers)} layers of {scores.num_experts} experts, the "
            f"model has {len(architecture.moe_layers)} MoE layers of {architecture.num_experts}"
        )
        raise UsageError(message)


def _score_metadata(ready: Preparation) -> dict[str, str]:
    return {
        "calibration_sha256": ready.corpus.sha256,
        "tokens": str(ready.corpus.num_tokens),
        "propagate": ready.run.propagate,
    }


def _findings(done: Mapping[int, Any], non_finite: Mapping[int, int]) -> dict[str, Any]:
    return {
        "unreached_experts": unreached_experts(done),
        "non_finite_outputs": {str(layer): count for layer, count in non_finite.items()},
    }


def _publish(
    model: OpenedModel, outputs: PrunedOutputs, job: Job, summary: Summary, output: OutputSettings
) -> None:
    """Writes what stands beside the shards, then puts the result in its place."""
    scores_path = job.path("scores.safetensors")
    save_scores(scores_path, outputs.scores({}))

    def documents(variant: Variant, kept: Kept) -> dict[str, bytes]:
        return {
            SCORES_FILE: scores_path.read_bytes(),
            RUN_FILE: summary.document(),
            "README.md": render_card(model, variant, kept, summary),
        }

    outputs.write_documents(documents, output.mtp)
    outputs.committer.drain()
    publish(job, overwrite=output.overwrite)
    job.discard()


def _clean_up(job: Job, started: float) -> Summary:
    """An earlier run was stopped between publishing its result and tidying up."""
    publish(job)
    job.discard()
    return summarize(
        seconds=time.monotonic() - started, read_nbytes=0, written_nbytes=0, details={}
    )
