"""The job `eval`: what pruning costs, measured in one reading of the source.

All candidates go through the layers in lockstep (`evaluation.lockstep`), then through the heads
(`evaluation.predictions`); nothing here holds a whole model, all layers' weights or all logits.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from reap_stream.checkpoint.reader import Reader
from reap_stream.errors import UsageError
from reap_stream.evaluation.candidates import Contestant
from reap_stream.evaluation.document import Evaluation, Result
from reap_stream.evaluation.lockstep import Lockstep
from reap_stream.evaluation.metrics import Comparison
from reap_stream.evaluation.opening import OpenedEvaluation, open_evaluation
from reap_stream.evaluation.positions import read_positions
from reap_stream.evaluation.predictions import compare_predictions
from reap_stream.evaluation.vocabulary import uncompared
from reap_stream.kept_record import kept_digest, recorded_digest
from reap_stream.progress import Progress
from reap_stream.resident import peak_device_nbytes, peak_resident_nbytes
from reap_stream.settings import EvalSettings


def evaluate(settings: EvalSettings) -> Evaluation:
    """Evaluates checkpoints, and prunings that were never written, on held-out text.

    Args:
        settings: what is evaluated, and on what; the first model is the reference.

    Raises:
        ReapStreamError: see its children; what can be refused is refused before the first layer.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        scratch = stack.enter_context(_scratch(settings.scratch))
        reader = stack.enter_context(Reader())
        opened = open_evaluation(settings, reader)
        positions = read_positions(opened.corpus, opened.memory.layers.batch_tokens)
        progress = stack.enter_context(_progress(opened, reader, shown=settings.progress))
        lockstep = Lockstep(
            opened, reader, positions, scratch=Path(scratch), progress=progress
        )  # fmt: skip
        stack.enter_context(lockstep)
        lockstep.run()
        found = compare_predictions(opened, lockstep, positions, progress)
        return Evaluation(
            results=tuple(_results(opened, found, lockstep.errors)),
            text=_text(opened),
            settings=_settings(opened, settings),
            seconds=time.monotonic() - started,
            read_nbytes=reader.bytes_read,
            predicted_nbytes=opened.memory.layers.peak_host,
            peak_nbytes=peak_resident_nbytes(),
            device_nbytes=peak_device_nbytes(),
            notes=(*opened.corpus.notes, *_notes(opened)),
        )


def _scratch(directory: Path | None) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="reap-stream-", dir=directory)
    except OSError as error:
        message = f"{directory or tempfile.gettempdir()}: no place for hidden states: {error}"
        raise UsageError(message) from error


def _progress(opened: OpenedEvaluation, reader: Reader, *, shown: bool) -> Progress:
    """A bar over all tokens of all candidates, through each layer and the head."""
    tokens = opened.corpus.num_tokens
    depths = [opened.depth(own.model) for own in opened.contestants]
    total = tokens * sum(depth + 1 for depth in depths)
    return Progress(max(depths), tokens, lambda: reader.bytes_read, total=total, shown=shown)


def _results(
    opened: OpenedEvaluation, found: Sequence[Comparison], errors: Sequence[dict[int, float]]
) -> Iterator[Result]:
    sources = opened.corpus.sources
    for contestant, comparison, layers in zip(opened.contestants, found, errors, strict=True):
        yield Result(
            label=contestant.label,
            model=opened.models[contestant.model].run.model,
            keep=contestant.keep,
            choice=_choice(contestant),
            all=comparison.figures(),
            sources={text: comparison.figures(n) for n, text in enumerate(sources)},
            layers=layers,
            kept_sha256=_kept_digest(opened, contestant),
            fingerprint=_fingerprint(opened, contestant),
        )


def _kept_digest(opened: OpenedEvaluation, contestant: Contestant) -> str | None:
    num_layers = opened.depth(contestant.model)
    if contestant.kept is not None:
        return kept_digest(contestant.kept, num_layers)
    return recorded_digest(opened.models[contestant.model].model.checkpoint.directory, num_layers)


def _fingerprint(opened: OpenedEvaluation, contestant: Contestant) -> str | None:
    checkpoint = opened.models[contestant.model].model.checkpoint
    # On the Hub, the same files have another one.
    is_directory = contestant.candidate is None and checkpoint.origin is None
    return checkpoint.fingerprint if is_directory else None


def _choice(contestant: Contestant) -> dict[str, Any]:
    candidate = contestant.candidate
    if candidate is None:
        return {}
    return {**candidate.choice.record(), "scores": str(candidate.scores)}


def _text(opened: OpenedEvaluation) -> dict[str, Any]:
    corpus = opened.corpus
    return {
        "sources": list(corpus.sources),
        "rows": len(corpus.rows),
        "tokens": corpus.num_tokens,
        "sha256": corpus.sha256,
    }


def _settings(opened: OpenedEvaluation, settings: EvalSettings) -> dict[str, Any]:
    memory = opened.memory.layers
    return {
        "samples": settings.samples,
        "sequence_length": settings.sequence_length,
        "seed": settings.seed,
        "device": str(opened.device),
        "compute_dtype": str(opened.models[0].dtype).removeprefix("torch."),
        "batch_tokens": memory.batch_tokens,
        "memory_budget_nbytes": memory.budget,
        "expert_slots": memory.expert_slots,
        "hidden_states_in_file": memory.spill,
    }


def _notes(opened: OpenedEvaluation) -> Iterator[str]:
    slots = opened.memory.layers.expert_slots
    for ready in opened.models:
        num_experts = ready.model.architecture.num_experts
        if slots < num_experts:
            yield (
                f"{ready.run.model}: memory holds {slots} of {num_experts} experts of a layer; the "
                "others were read again for every batch and candidate"
            )
    yield from uncompared([ready.model for ready in opened.models])
    yield from _unlike(opened)


def _unlike(opened: OpenedEvaluation) -> Iterator[str]:
    """What keeps hidden states from being compared layer by layer."""
    shape, depth = opened.models[0].handover.token_shape, opened.depth(0)
    for model, ready in enumerate(opened.models):
        own, layers = ready.handover.token_shape, opened.depth(model)
        if own != shape:
            yield (
                f"{ready.run.model}: hidden states of {list(own)} a token, the reference's are "
                f"{list(shape)}: only predictions are compared"
            )
        elif layers != depth:
            yield (
                f"{ready.run.model}: {layers} layers, the reference has {depth}: hidden states are "
                f"compared after the first {min(layers, depth)}, number by number"
            )
