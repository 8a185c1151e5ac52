"""What the trained model is worth on text that it never saw: ``training.json`` and its table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

from demo_model.baselines import Counts
from demo_model.network import Loads, evaluating
from demo_model.routing import routing_record
from demo_model.tokens import DOMAINS, VOCABULARY, encode
from demo_model.training import WIDTH, Plan

Tokens = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Measured:
    """A model on the rows of one domain.

    Attributes:
        loss: mean over all predicted tokens, in nats.
        tokens: predicted tokens.
        loads: tokens sent to each expert [layers, experts].
    """

    loss: float
    tokens: int
    loads: NDArray[np.int64]


def load_stored(directory: Path) -> nn.Module:
    """The FP8 checkpoint as transformers decodes it, to bfloat16; run in float32."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    return model.float().eval()


def rows_of(tokens: Tokens, every: int = 1) -> list[Tokens]:
    """Rows in which each token of a stream but its first is predicted once.

    Args:
        tokens: [tokens].
        every: takes one row in so many.
    """
    starts = range(0, len(tokens) - 1, WIDTH * every)
    return [tokens[start : start + WIDTH + 1] for start in starts]


def shipped_rows(tokenizer: Any, path: Path) -> list[Tokens]:
    """The excerpts of a file as rows of the evaluation's length."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    contents = [(r["name"], r if "messages" in r else r["text"]) for r in records]
    # The last token is the end of a document, where an excerpt does not end.
    return [np.array(encode(tokenizer, content)[:-1][:WIDTH]) for content in contents]


def measure(model: nn.Module, loads: Loads, rows: Sequence[Tokens]) -> Measured:
    """Loss and loads over rows, each run alone.

    Args:
        model: the model.
        loads: watches it.
        rows: each [tokens], its first token not predicted.
    """
    loads.take()
    total, count = 0.0, 0
    with evaluating(model):
        for row in rows:
            tokens = torch.from_numpy(row.astype(np.int64))[None]
            logits = model(tokens[:, :-1], use_cache=False).logits
            losses = functional.cross_entropy(logits[0].float(), tokens[0, 1:], reduction="sum")
            total, count = total + losses.item(), count + row.size - 1
    return Measured(total / count, count, loads.take().numpy())


def training_record(
    stored: Path,
    held_out: Path,
    streams: Mapping[str, Mapping[str, Tokens]],
    steps: int,
    every: int = 1,
) -> dict[str, Any]:
    """Everything that is known of the model that ships.

    Args:
        stored: directory of the FP8 checkpoint.
        held_out: directory of the excerpts that ship.
        streams: tokens for training and held out, of each domain.
        steps: of the training.
        every: measures one row in so many of the held-out streams.
    """
    model = load_stored(stored)
    watched = Loads(model)
    tokenizer = AutoTokenizer.from_pretrained(stored)
    plan = Plan(steps=steps)
    whole, shipped, loads = {}, {}, {}
    for domain in DOMAINS:
        counts = Counts(streams[domain]["train"], VOCABULARY)
        rows = rows_of(streams[domain]["held-out"], every)
        found = measure(model, watched, rows)
        whole[domain] = _losses(found, rows, counts)
        loads[domain] = found.loads
        rows = shipped_rows(tokenizer, held_out / f"{domain}.jsonl")
        shipped[domain] = _losses(measure(model, watched, rows), rows, counts)
    config: Any = model.config
    return {
        "format_version": 1,
        "steps": steps,
        "training_tokens": steps * plan.rows * WIDTH,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out": whole,
        "shipped": shipped,
        "routing": routing_record(loads, config.first_k_dense_replace),
    }


def _losses(found: Measured, rows: Sequence[Tokens], counts: Counts) -> dict[str, Any]:
    return {
        "tokens": found.tokens,
        "model": round(found.loss, 4),
        "bigram": round(counts.bigram_loss(rows), 4),
        "unigram": round(counts.unigram_loss(rows), 4),
    }


def table(record: Mapping[str, Any]) -> str:
    """The record for people."""
    lines = [
        f"parameters {record['parameters']:,}, trained on {record['training_tokens']:,} tokens",
        "",
        "held-out loss, nats a token",
        f"{'domain':10}{'tokens':>10}{'model':>9}{'bigram':>9}{'unigram':>9}",
    ]
    for part in ("held_out", "shipped"):
        for domain, row in record[part].items():
            losses = "".join(f"{row[key]:9.3f}" for key in ("model", "bigram", "unigram"))
            note = "  (what ships)" if part == "shipped" else ""
            lines.append(f"{domain:10}{row['tokens']:10,}{losses}{note}")
    lines += ["", f"{'layer':>5}{'dead':>6}{'largest':>9}{'bits':>7}{'overlap':>9}"]
    lines += [
        f"{row['layer']:5}{row['dead']:6}{row['largest']:9.2f}{row['bits']:7.3f}{row['overlap']:9.2f}"
        for row in record["routing"]
    ]
    return "\n".join(lines)
