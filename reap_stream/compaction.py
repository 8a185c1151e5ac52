"""The job `compact`: the writer without the pass, on saved scores, as fast as the disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reap_stream.calibration_record import calibration_record
from reap_stream.checkpoint.providers import model_name
from reap_stream.checkpoint.shard_uses import CopyOrder
from reap_stream.download import check_download
from reap_stream.finishing import check_job, clean_up, open_job, publish_outputs, writing_findings
from reap_stream.model.opened import OpenedModel, open_model
from reap_stream.mtp_choice import MtpChoice, choose_scored_mtp
from reap_stream.outputs import PrunedOutputs
from reap_stream.progress import byte_bar
from reap_stream.pruning import (
    Variant,
    check_config,
    model_chooser,
    plan_variants,
    read_targets,
    recoded,
)
from reap_stream.records import Summary, source_record, summarize, versions
from reap_stream.scores_fit import check_scores
from reap_stream.scoring.choosing import Chooser
from reap_stream.scoring.saliency import LayerStats, Scores
from reap_stream.scoring.scores_file import load_scores
from reap_stream.serving import serving_record
from reap_stream.settings import ChoiceSettings, OutputSettings
from reap_stream.shard_order import copy_order


def compact(
    model_path: Path,
    scores_path: Path,
    choice: ChoiceSettings,
    output: OutputSettings,
    *,
    other_weights: bool = False,
    trust_remote_code: bool = False,
) -> Summary:
    """Writes a pruned checkpoint from saved scores, without running the model.

    Args:
        model_path: the checkpoint the scores were taken on.
        scores_path: a file that `observe`, `merge` or `prune` wrote.
        choice: how experts are chosen from the scores.
        output: the targets and where they are written.
        other_weights: take scores of the same model in other weights, in another format perhaps.
        trust_remote_code: let the checkpoint's own code build the model.

    Raises:
        UsageError: the scores are of another model or lack a layer.
        ReapStreamError: see its children.
    """
    started = time.monotonic()
    check_job(output.output, model_path, output)
    model = open_model(model_path, trust_remote_code=trust_remote_code)
    ready = _prepare(model, scores_path, choice, output, other_weights=other_weights)
    settings = {"model": model_name(model_path), **ready.settings}
    with ExitStack() as stack:
        job = stack.enter_context(open_job(output.output, settings, ready.output))
        if job.is_published:
            return clean_up(job, started)
        outputs = PrunedOutputs(
            ready.model, ready.variants, job, ready.scores.sources, ready.chooser, ready.mtp.kind
        )
        stack.enter_context(outputs.committer)
        with byte_bar(sum(variant.plan.total_size for variant in ready.variants)) as bar:
            for _ in _write(ready, outputs):
                bar.update(outputs.written_nbytes - bar.n)
        summary = summarize(
            seconds=time.monotonic() - started,
            read_nbytes=outputs.copied_nbytes,
            written_nbytes=outputs.written_nbytes,
            details=_details(ready, outputs, settings),
        )
        publish_outputs(ready.model, outputs, job, summary, ready.output)
    return summary


@dataclass(frozen=True, slots=True)
class _Ready:
    """What is known before anything is written.

    Attributes:
        model: the source, with its weights as they are to be written.
        scores: chosen by.
        calibration: what they were taken on, as run.json has it.
        output: the targets and where they are written.
        mtp: what happens to next-token-prediction layers.
        variants: what is to be written.
        chooser: chooses experts.
        order: when each shard is read.
        settings: what decides the result; compared when the job is resumed.
    """

    model: OpenedModel
    scores: Scores
    calibration: Mapping[str, Any]
    output: OutputSettings
    mtp: MtpChoice
    variants: list[Variant]
    chooser: Chooser
    order: CopyOrder
    settings: Mapping[str, Any]


def _prepare(
    model: OpenedModel,
    scores_path: Path,
    choice: ChoiceSettings,
    output: OutputSettings,
    *,
    other_weights: bool,
) -> _Ready:
    """Checks that scores and model belong together and that there is room; see `compact`."""
    scores = load_scores(scores_path)
    same_weights = check_scores(model, scores, scores_path, other_weights=other_weights)
    calibration = calibration_record(scores.metadata, str(scores_path))
    mtp = choose_scored_mtp(model, output.mtp, scores.layers, str(scores_path))
    output = replace(output, mtp=mtp.kind)
    model = recoded(model, output, mtp.kind)
    variants = plan_variants(model, read_targets(model, output), output)
    chooser = model_chooser(model, scores.sources, choice).knowing(scores.layers)
    for variant in variants:
        chooser.check(scores.num_experts, variant.target.keep)
    check_config(model, variants, output.mtp)
    order = copy_order(model, mtp.kind)
    plans = () if output.resume else tuple(variant.plan for variant in variants)
    check_download(model, order.shards, output.output, plans)
    settings = {
        **output.record(),
        **choice.record(),
        "source": model.checkpoint.fingerprint,
        "scores": hashlib.sha256(scores_path.read_bytes()).hexdigest(),
        # Only where it is so: jobs of earlier versions lack it.
        **({} if same_weights else {"scores_of_other_weights": scores.model_fingerprint}),
    }
    return _Ready(model, scores, calibration, output, mtp, variants, chooser, order, settings)


def _details(ready: _Ready, outputs: PrunedOutputs, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json says beside time, bytes and memory."""
    model = ready.model
    return {
        "format_version": 1,
        "versions": versions(),
        "settings": dict(settings),
        "calibration": {"sources": list(ready.scores.sources), **ready.calibration},
        "source": source_record(model),
        **writing_findings(outputs, ready.variants),
        "weights": dict(model.change.counts),
        "mtp": ready.mtp.record(model),
        "serving": serving_record(model, ready.variants, outputs.choices),
    }


def _chosen(ready: _Ready) -> dict[int, LayerStats]:
    """The layers whose experts are chosen by their own scores."""
    scored = ready.model.mtp_kept_layers() if ready.mtp.kind == "score" else ()
    layers = (*ready.model.architecture.moe_layers, *scored)
    return {index: ready.scores.layers[index] for index in layers}


def _write(ready: _Ready, outputs: PrunedOutputs) -> Iterator[None]:
    """Writes everything, layer by layer; gives way after each."""
    order, layers = ready.order, _chosen(ready)
    steps = sorted({*range(ready.model.architecture.num_layers), *layers})
    todo = [index for index in steps if not outputs.is_done(index)]
    order.shards.begin(todo[0] if todo else order.shards.end)
    for index in todo:
        outputs.write_whole(*order.whole.get(index, ()))
        outputs.finish(index, layers.get(index), lambda _: None)
        order.shards.done(index)
        yield
    outputs.finish_rest()
    yield
