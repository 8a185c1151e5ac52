"""Everything an evaluation needs, opened and checked before the first layer is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch

from reap_stream.calibration.corpus import Corpus
from reap_stream.calibration.spec import parse_spec
from reap_stream.checkpoint.reader import Reader
from reap_stream.checkpoint.shard_uses import ShardOrder
from reap_stream.checkpoint.source import open_config
from reap_stream.demands import Demands, larger_demands
from reap_stream.download import check_downloads
from reap_stream.evaluation.budget import EvaluationMemory, plan_evaluation
from reap_stream.evaluation.candidates import Contestant, contestants
from reap_stream.evaluation.vocabulary import check_vocabularies
from reap_stream.model.architecture import Architecture
from reap_stream.model.handover import Handover
from reap_stream.model.lm_head import LmHead
from reap_stream.model.opened import OpenedModel, check_forward, open_model
from reap_stream.model.wiring import read_handover
from reap_stream.mtp_choice import MtpChoice
from reap_stream.preparation import (
    Preparation,
    choose_device,
    choose_dtype,
    demands_of,
    read_corpus,
    reduced_architecture,
    try_embedding,
)
from reap_stream.settings import EvalSettings
from reap_stream.shard_order import shard_order

# Next-token-prediction layers take no part in the model's own loss.
_NO_MTP = MtpChoice("match")


@dataclass(frozen=True, slots=True)
class OpenedEvaluation:
    """All that takes part in an evaluation, and how it will be run.

    Attributes:
        models: the checkpoints, the reference's first.
        contestants: all that are compared, the reference first.
        reduced: kept count → the reference's architecture with as many experts.
        heads: of each checkpoint; those with the same weights are one object.
        memory: how the memory is divided.
        orders: when the shards of each checkpoint are read.
    """

    models: tuple[Preparation, ...]
    contestants: tuple[Contestant, ...]
    reduced: dict[int, Architecture]
    heads: tuple[LmHead, ...]
    memory: EvaluationMemory
    orders: tuple[ShardOrder, ...]

    @property
    def corpus(self) -> Corpus:
        """The rows, which are the same for all."""
        return self.models[0].corpus

    @property
    def device(self) -> torch.device:
        """Where layers and heads run."""
        return self.models[0].device

    def depth(self, model: int) -> int:
        """Decoder layers of a checkpoint."""
        return self.models[model].model.architecture.num_layers

    def ways(self, model: int) -> list[int]:
        """Numbers of the contestants with a checkpoint's weights: first the checkpoint itself."""
        return [n for n, own in enumerate(self.contestants) if own.model == model]


def open_evaluation(settings: EvalSettings, reader: Reader) -> OpenedEvaluation:
    """Opens the models, the scores and the text, and plans the memory.

    Args:
        settings: what is evaluated.
        reader: reads the weights.

    Raises:
        ReapStreamError: anything that would make the evaluation fail later, found now.
    """
    for text in settings.text:
        # Malformed SPECs are refused before large models are opened.
        parse_spec(text)
    first = settings.models[0]
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.compute_dtype, open_config(first).config, device)
    opened = [_open(path, dtype, settings) for path in settings.models]
    check_vocabularies(opened)
    orders = tuple(shard_order(model, None, writes=False) for model in opened)
    check_downloads(opened, orders)
    everyone = contestants(settings.models, opened, settings.candidates)
    corpus = read_corpus(settings.run(first), opened[0])
    handovers = [_handover(model, corpus, device) for model in opened]
    heads = _shared([LmHead(model, reader, device) for model in opened])
    keeps = {own.keep for own in everyone if own.kept is not None}
    reduced = {keep: reduced_architecture(opened[0], keep, device) for keep in sorted(keeps)}
    counts = Counter(own.model for own in everyone)
    token_nbytes = sum(handovers[model].token_nbytes * count for model, count in counts.items())
    memory = plan_evaluation(
        _demands(opened, handovers, corpus, max(keeps, default=0)),
        hidden_nbytes=corpus.num_tokens * token_nbytes,
        heads=heads,
        budget=settings.memory,
        batch_tokens=settings.batch_tokens,
        device=device,
    )
    models = tuple(
        Preparation(
            settings.run(path), model, corpus, device, dtype, memory.layers, _NO_MTP, handover
        )
        for path, model, handover in zip(settings.models, opened, handovers, strict=True)
    )
    return OpenedEvaluation(models, tuple(everyone), reduced, tuple(heads), memory, orders)


def _open(path: Path, dtype: torch.dtype, settings: EvalSettings) -> OpenedModel:
    model = open_model(path, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    check_forward(model)
    return model


def _longest_row(corpus: Corpus) -> int:
    return max(row.tokens.size for row in corpus.rows)


def _handover(model: OpenedModel, corpus: Corpus, device: torch.device) -> Handover:
    """What goes from layer to layer and to the head, tried on the code before the layers."""
    handover = read_handover(model.architecture, device, _longest_row(corpus), to_end=True)
    try_embedding(model, corpus, device, handover)
    return handover


def _shared(heads: list[LmHead]) -> list[LmHead]:
    """The same heads, with one object for all that have the same weights."""
    found: list[LmHead] = []
    for head in heads:
        found.append(next((known for known in found if head.same_weights(known)), head))
    return found


def _demands(
    models: Sequence[OpenedModel], handovers: Sequence[Handover], corpus: Corpus, most_kept: int
) -> Demands:
    """What the layers of any of the models take, and a twin of the reference's beside it."""
    longest = _longest_row(corpus)
    pairs = zip(models, handovers, strict=True)
    own = [demands_of(model, handover, longest_row=longest) for model, handover in pairs]
    return replace(reduce(larger_demands, own), twin=own[0].expert * most_kept)
