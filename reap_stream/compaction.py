"""The job `compact`: the writer without the pass, on saved scores, as fast as the disk."""

from __future__ import annotations

import hashlib
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from reap_stream.checkpoint.providers import prefetch_files
from reap_stream.errors import UsageError
from reap_stream.finishing import check_job, clean_up, open_job, publish_outputs, writing_findings
from reap_stream.model.opened import OpenedModel, open_model
from reap_stream.mtp_choice import choose_scored_mtp
from reap_stream.outputs import PrunedOutputs
from reap_stream.progress import byte_bar
from reap_stream.pruning import (
    check_config,
    model_chooser,
    plan_variants,
    read_targets,
    recoded,
)
from reap_stream.records import Summary, source_record, summarize, versions
from reap_stream.scoring.saliency import Scores
from reap_stream.scoring.scores_file import load_scores
from reap_stream.serving import serving_record
from reap_stream.settings import ChoiceSettings, OutputSettings


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
    check_job(output.output, model_path, output)
    model = open_model(model_path, trust_remote_code=trust_remote_code)
    scores = load_scores(scores_path)
    check_scores(model, scores, scores_path)
    mtp = choose_scored_mtp(model, output.mtp, scores.layers, str(scores_path))
    output = replace(output, mtp=mtp.kind)
    model = recoded(model, output, mtp.kind)
    variants = plan_variants(model, read_targets(model, output), output)
    chooser = model_chooser(model, scores.sources, choice).knowing(scores.layers)
    for variant in variants:
        chooser.check(scores.num_experts, variant.target.keep)
    check_config(model, variants, output.mtp)
    settings = {
        **output.record(),
        **choice.record(),
        "source": model.checkpoint.fingerprint,
        "scores": hashlib.sha256(scores_path.read_bytes()).hexdigest(),
    }
    with ExitStack() as stack:
        job = stack.enter_context(open_job(output.output, settings, output))
        if job.is_published:
            return clean_up(job, started)
        prefetch_files(model.checkpoint.shards)
        outputs = PrunedOutputs(model, variants, job, scores.sources, chooser, mtp.kind)
        stack.enter_context(outputs.committer)
        with byte_bar(sum(variant.plan.total_size for variant in variants)) as bar:
            scored = model.mtp_kept_layers() if mtp.kind == "score" else ()
            for index in (*model.architecture.moe_layers, *scored):
                if not outputs.is_done(index):
                    outputs.finish(index, scores.layers[index], lambda _: None)
                bar.update(outputs.written_nbytes - bar.n)
            outputs.finish_rest()
            bar.update(outputs.written_nbytes - bar.n)
        details = {
            "format_version": 1,
            "versions": versions(),
            "settings": settings,
            "source": source_record(model),
            "calibration": {"sources": list(scores.sources), **scores.metadata},
            **writing_findings(outputs, variants),
            "weights": dict(model.change.counts),
            "mtp": mtp.record(model),
            "serving": serving_record(model, variants, outputs.choices),
        }
        summary = summarize(
            seconds=time.monotonic() - started,
            read_nbytes=outputs.copied_nbytes,
            written_nbytes=outputs.written_nbytes,
            details=details,
        )
        publish_outputs(model, outputs, job, summary, output)
    return summary


def check_scores(model: OpenedModel, scores: Scores, path: Path) -> None:
    """Refuse scores that are not those of a model.

    Raises:
        UsageError: they are of another model, or lack a layer.
    """
    architecture = model.architecture
    if scores.model_fingerprint != model.checkpoint.fingerprint:
        message = (
            f"{path}: these scores were taken on another model (fingerprint "
            f"{scores.model_fingerprint[:12]}…, {model.checkpoint.directory} has "
            f"{model.checkpoint.fingerprint[:12]}…){_other_identity(model)}"
        )
        raise UsageError(message)
    missing = [layer for layer in architecture.moe_layers if layer not in scores.layers]
    if missing or scores.num_experts != architecture.num_experts:
        message = (
            f"{path}: scores of {len(scores.layers)} layers of {scores.num_experts} experts, the "
            f"model has {len(architecture.moe_layers)} MoE layers of {architecture.num_experts}"
        )
        raise UsageError(message)


def _other_identity(model: OpenedModel) -> str:
    """What to do where both are one model after all, told apart by where it was read."""
    if model.checkpoint.origin is None:
        return "; scores that were taken on a model of the Hub need its id here, not a directory"
    return "; scores that were taken on a directory need that directory here, not the Hub's id"
