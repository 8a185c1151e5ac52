"""Everything a pass needs, opened and checked before the first weight is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reap_stream.calibration.batches import Batch, plan_batches
from reap_stream.calibration.corpus import Corpus, load_corpus
from reap_stream.calibration.dealing import deal
from reap_stream.calibration.rules import RowSettings
from reap_stream.calibration.spec import CalibrationSpec, parse_spec
from reap_stream.checkpoint.reader import Reader
from reap_stream.checkpoint.source import open_config
from reap_stream.demands import Demands, larger_demands, measure_demands, mtp_demands
from reap_stream.errors import CalibrationError, UsageError
from reap_stream.memory import MemoryPlan, plan_memory
from reap_stream.model.architecture import Architecture, read_architecture, with_expert_count
from reap_stream.model.feeds import layer_feeds
from reap_stream.model.handover import Handover
from reap_stream.model.mtp_head import MtpHead
from reap_stream.model.opened import OpenedModel, check_forward, open_model
from reap_stream.model.skeleton import Skeleton
from reap_stream.model.transformers_api import load_tokenizer, materialize_buffers
from reap_stream.model.wiring import read_handover
from reap_stream.mtp_choice import MtpChoice
from reap_stream.ranks.base import ALONE, Ranks
from reap_stream.scoring.saliency import METHODS
from reap_stream.settings import RunSettings
from reap_stream.sharing import own_device, share_memory, sharers

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class Preparation:
    """A model, its calibration rows, and how they will be run.

    Attributes:
        run: the settings.
        model: the opened model.
        corpus: the calibration rows.
        device: where layers run.
        dtype: what they compute in.
        memory: how the memory is divided.
        mtp: what happens to next-token-prediction layers.
        handover: what goes from layer to layer.
        ranks: the processes that share the rows.
    """

    run: RunSettings
    model: OpenedModel
    corpus: Corpus
    device: torch.device
    dtype: torch.dtype
    memory: MemoryPlan
    mtp: MtpChoice
    handover: Handover
    ranks: Ranks = ALONE

    @property
    def batches(self) -> list[Batch]:
        """The batches that this rank runs."""
        lengths = [row.tokens.size for row in self.corpus.rows]
        batches = plan_batches(lengths, self.memory.batch_tokens)
        return deal(batches, self.ranks.rank, self.ranks.size)

    @property
    def moe_layers(self) -> list[int]:
        """Layers that are scored, ascending: the decoder's, then next-token-prediction layers."""
        head = self.mtp.head
        return [*self.model.architecture.moe_layers, *(head.moe_layers if head else ())]

    @property
    def num_layers(self) -> int:
        """Layers that must run: none behind the last that is scored."""
        return self.moe_layers[-1] + 1

    def job_settings(self) -> dict[str, Any]:
        """What decides the result; compared when a job is resumed."""
        return {
            **self.run.record(),
            "device": self.device.type,
            "compute_dtype": str(self.dtype).removeprefix("torch."),
            "batch_tokens": self.memory.batch_tokens,
            "grouped_products": self.memory.grouped,
            "source": self.model.checkpoint.fingerprint,
            "calibration_sha256": self.corpus.sha256,
        }


def prepare_run(
    run: RunSettings,
    choose: Callable[[OpenedModel, torch.device], MtpChoice] | None = None,
    plan: Callable[[OpenedModel, MtpChoice], OpenedModel] | None = None,
    ranks: Ranks = ALONE,
) -> Preparation:
    """Opens the model and the calibration data, and plans the memory.

    Args:
        run: the model, the data, and how it is run.
        choose: decides what happens to next-token-prediction layers; None: they are not run.
        plan: decides what is written, and refuses what cannot be, before the first weight is read;
            gives the model as it is to be written. None: nothing is written.
        ranks: the processes that share the rows.

    Raises:
        ReapStreamError: anything that would make the pass fail later, found now.
    """
    if run.method not in METHODS:
        message = f"--method {run.method}: choose one of {', '.join(METHODS)}"
        raise UsageError(message)
    if run.propagate not in ("original", "pruned"):
        message = f"--propagate {run.propagate}: choose original or pruned"
        raise UsageError(message)
    device = own_device(choose_device(run.device), ranks)
    # Malformed SPECs are refused before a large model is opened.
    for text in run.calibration:
        parse_spec(text)
    dtype = choose_dtype(run.compute_dtype, open_config(run.model).config, device)
    model = open_model(run.model, dtype=dtype, trust_remote_code=run.trust_remote_code)
    check_forward(model)
    mtp = MtpChoice("match") if choose is None else choose(model, device)
    model = model if plan is None else plan(model, mtp)
    corpus = read_corpus(run, model)
    lengths = [row.tokens.size for row in corpus.rows]
    handover = read_handover(model.architecture, device, max(lengths))
    demands = demands_of(model, handover, longest_row=max(lengths), head=mtp.head)

    def divide(tokens: int, batch_tokens: int | None) -> MemoryPlan:
        return plan_memory(
            demands,
            hidden_nbytes=tokens * handover.token_nbytes,
            budget=run.memory,
            batch_tokens=batch_tokens,
            device=device,
            sharers=sharers(device, run.device, ranks),
        )

    memory = share_memory(divide, run.batch_tokens, lengths, ranks)
    try_embedding(model, corpus, device, handover)
    return Preparation(run, model, corpus, device, dtype, memory, mtp, handover, ranks)


def read_corpus(run: RunSettings, model: OpenedModel) -> Corpus:
    """The rows that a run's SPECs name, as token ids of the model.

    Raises:
        ReapStreamError: as `load_corpus`.
    """
    specs = [parse_spec(text) for text in run.calibration]
    rows = RowSettings(
        samples=run.samples,
        sequence_length=run.sequence_length,
        seed=run.seed,
        pack=run.pack,
        field_map=run.field_map,
    )
    vocab_size = model.architecture.embedding.weight.shape[0]
    return load_corpus(specs, read_tokenizer(run, specs), vocab_size, rows)


def reduced_architecture(model: OpenedModel, keep: int, device: torch.device) -> Architecture:
    """A model's architecture with as many experts as are kept, its code ready to run on `device`."""
    checkpoint, full = model.checkpoint, model.architecture
    reduced = read_architecture(
        checkpoint.directory,
        with_expert_count(checkpoint.config, full.count_paths, keep),
        dtype=full.model.dtype,
        trust_remote_code=model.trust_remote_code,
    )
    materialize_buffers(reduced.model, device)
    return reduced


def try_embedding(
    model: OpenedModel, corpus: Corpus, device: torch.device, handover: Handover
) -> None:
    """Runs the model around its layers once, on two tokens.

    Raises:
        UnsupportedError: the embedding cannot be read row by row.
    """
    tokens = np.resize(corpus.rows[0].tokens, (1, 2)).astype(np.int64)
    with Reader() as reader:
        Skeleton(model, reader, device, handover).embed(tokens)


def read_tokenizer(run: RunSettings, specs: list[CalibrationSpec]) -> Callable[..., Any] | None:
    """The model's tokenizer; None where the checkpoint has none and no SPEC needs one."""
    directory: Path = run.model
    if not any(os.path.lexists(directory / name) for name in _TOKENIZER_FILES):
        return None
    if all(spec.kind == "file" and spec.path.suffix == ".npy" for spec in specs):
        return None
    try:
        tokenizer: Callable[..., Any] = load_tokenizer(
            directory, trust_remote_code=run.trust_remote_code
        )
    except Exception as error:
        message = f"{directory}: its tokenizer cannot be loaded: {error}"
        raise CalibrationError(message) from error
    return tokenizer


def choose_device(name: str) -> torch.device:
    """The device of ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.

    Raises:
        UsageError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        message = f"--device {name}: {error}"
        raise UsageError(message) from error
    if device.type not in ("cpu", "cuda"):
        message = f"--device {name}: only cpu and cuda are supported"
        raise UsageError(message)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        message = f"--device {name}: there are {torch.cuda.device_count()} CUDA devices"
        raise UsageError(message)
    return device


def choose_dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    """The dtype of the forward: ``auto`` is bfloat16 where it is fast and the model was made so."""
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) and nested else config
    stored = text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype")
    if stored in ("float32", "float16"):
        return torch.float32
    fast = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 - the one way to ask
    return torch.bfloat16 if fast else torch.float32


def memory_for(
    model: OpenedModel,
    num_tokens: int,
    device: torch.device,
    run: RunSettings,
    *,
    longest_row: int,
    head: MtpHead | None = None,
) -> MemoryPlan:
    """The memory of a pass of `num_tokens` tokens, in rows of up to `longest_row`.

    Args:
        model: the model.
        num_tokens: of the calibration data.
        device: where layers run.
        run: the budget and the batches.
        longest_row: tokens of the longest row.
        head: next-token-prediction layers that are run too.

    Raises:
        UsageError: the budget cannot hold it.
        UnsupportedError: the model's layers cannot be run one by one.
    """
    handover = read_handover(model.architecture, device, longest_row)
    demands = demands_of(model, handover, longest_row=longest_row, head=head)
    return plan_memory(
        demands,
        hidden_nbytes=num_tokens * handover.token_nbytes,
        budget=run.memory,
        batch_tokens=run.batch_tokens,
        device=device,
    )


def demands_of(
    model: OpenedModel, handover: Handover, *, longest_row: int, head: MtpHead | None = None
) -> Demands:
    """What a model's layers take; see `memory_for`."""
    architecture = model.architecture
    dtype: torch.dtype = architecture.model.dtype
    feeds = layer_feeds(architecture, model.tensor_map)
    demands = measure_demands(
        architecture, feeds, dtype, longest_row=longest_row, handover=handover
    )
    if head is not None:
        own = head.opened
        feeds = layer_feeds(own.architecture, own.tensor_map)
        other = mtp_demands(own.architecture, feeds, dtype, longest_row=longest_row)
        demands = larger_demands(demands, other)
    return replace(demands, writing=model.change.working_nbytes)
