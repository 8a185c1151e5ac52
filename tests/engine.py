"""The engine's parts put together as the jobs do, with what they hold laid open to a test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from reap_stream.calibration.batches import plan_batches
from reap_stream.checkpoint.reader import Reader
from reap_stream.forward import ForwardPass
from reap_stream.model.lm_head import LmHead
from reap_stream.model.opened import open_model
from reap_stream.mtp_choice import choose_mtp
from reap_stream.pipeline import prune
from reap_stream.preparation import Preparation, prepare_run
from reap_stream.progress import Progress
from reap_stream.scoring.accumulator import SaliencyAccumulator
from reap_stream.scoring.saliency import LayerStats
from reap_stream.settings import OutputSettings, RunSettings

BATCH_TOKENS = 72


def run_settings(model: Path, calibration: Sequence[str], **options: Any) -> RunSettings:
    """Settings of a float32 run in small batches on the CPU."""
    defaults: dict[str, Any] = {
        "batch_tokens": BATCH_TOKENS,
        "compute_dtype": "float32",
        "device": "cpu",
        "progress": False,
    }
    return RunSettings(model=model, calibration=tuple(calibration), **{**defaults, **options})


def prune_to(
    output: Path, model: Path, calibration: Sequence[str], keep: int | str = 4, **options: Any
) -> Path:
    """Prunes a checkpoint; options of `OutputSettings` and `RunSettings` by name."""
    own = set(OutputSettings.__dataclass_fields__)
    writing = {name: value for name, value in options.items() if name in own}
    running = {name: value for name, value in options.items() if name not in own}
    prune(
        run_settings(model, calibration, **running),
        OutputSettings(output=output, keep=str(keep), **writing),
    )
    return output


@dataclass(frozen=True)
class Streamed:
    """What a streamed pass gave.

    Attributes:
        states: layer → row → hidden states after the layer, [tokens, hidden].
        stats: MoE layer → its sums.
    """

    states: list[list[torch.Tensor]]
    stats: dict[int, LayerStats]


def stream(ready: Preparation, scratch: Path, **memory: Any) -> Streamed:
    """Runs all layers; `memory` replaces fields of the memory plan."""
    ready = replace(ready, memory=replace(ready.memory, **memory))
    architecture, corpus = ready.model.architecture, ready.corpus
    states: list[list[torch.Tensor]] = []
    stats: dict[int, LayerStats] = {}
    with ExitStack() as stack:
        reader = stack.enter_context(Reader())
        progress = stack.enter_context(
            Progress(architecture.num_layers, corpus.num_tokens, lambda: 0, shown=False)
        )
        forward = ForwardPass(ready, reader, spill_path=scratch / "spill", progress=progress)
        stack.enter_context(forward)
        forward.embed()
        for index in range(max(architecture.num_layers, ready.num_layers)):
            accumulator = None
            if index in ready.moe_layers:
                accumulator = SaliencyAccumulator(
                    architecture.num_experts, len(corpus.sources), ready.device
                )
            with forward.layer(index, accumulator) as layer:
                forward.advance(index, layer)
            if accumulator is not None:
                stats[index], lost = accumulator.finish()
                assert lost == 0
            states.append(_by_row(forward, ready))
    return Streamed(states, stats)


def _by_row(forward: ForwardPass, ready: Preparation) -> list[torch.Tensor]:
    lengths = [len(row.tokens) for row in ready.corpus.rows]
    rows: dict[int, torch.Tensor] = {}
    for batch in plan_batches(lengths, ready.memory.batch_tokens):
        for number, where in zip(batch.row_indices, batch.rows, strict=True):
            rows[number] = forward.states.load(where.start, where.stop).clone()
    return [rows[number] for number in range(len(lengths))]


def prepare(
    model: Path, calibration: Sequence[str], mtp: str = "match", **options: Any
) -> Preparation:
    """`prepare_run` with the settings of `run_settings`."""
    settings = run_settings(model, calibration, **options)
    return prepare_run(settings, lambda opened, device: choose_mtp(opened, mtp, device))


def corpus_rows(ready: Preparation) -> list[np.ndarray[Any, Any]]:
    """The calibration rows in the corpus' order."""
    return [np.asarray(row.tokens) for row in ready.corpus.rows]


def head_of(directory: Path, reader: Reader, dtype: torch.dtype = torch.float32) -> LmHead:
    """The streamed head of a checkpoint, on the CPU."""
    return LmHead(open_model(directory, dtype=dtype), reader, torch.device("cpu"))


def run_record(directory: Path) -> Any:
    """reap/run.json of a pruned checkpoint."""
    return json.loads((directory / "reap" / "run.json").read_text(encoding="utf-8"))


def read_kept(directory: Path) -> dict[int, list[int]]:
    """reap/kept_experts.json."""
    import json

    document = json.loads((directory / "reap" / "kept_experts.json").read_text(encoding="utf-8"))
    return {int(layer): experts for layer, experts in document["kept"].items()}


def read_scores(directory: Path) -> dict[str, np.ndarray[Any, Any]]:
    """reap/scores.safetensors."""
    arrays: dict[str, np.ndarray[Any, Any]] = load_file(directory / "reap" / "scores.safetensors")
    return arrays
