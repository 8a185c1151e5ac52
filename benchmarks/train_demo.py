"""Trains the model that ships with the package for `reap-stream demo`.

    python benchmarks/train_demo.py --work DIRECTORY

Texts, tokens and the state of the training are kept in DIRECTORY, so that the same command goes on
where it was stopped. A GPU is used if there is one. The trained model is stored in DIRECTORY, in
bfloat16 and in FP8, with held-out texts and a report; `--ship` puts what the package carries into
reap_stream/demo.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_model.held_out import write_held_out
from demo_model.reporting import table, training_record
from demo_model.storing import load_state, ship, store_bf16, store_fp8, write_json
from demo_model.texts import fetch_prose
from demo_model.tokens import DOMAINS, encoded, make_tokenizer
from demo_model.training import Plan, train
from transformers import AutoTokenizer

PACKAGE = Path(__file__).parents[1] / "reap_stream" / "demo"


def main() -> None:
    """Fetches, trains, stores, reports."""
    arguments = _arguments()
    work, into = arguments.work, arguments.preview or arguments.work
    fetch_prose(work / "prose")
    if not (work / "tokenizer").is_dir():
        make_tokenizer(work / "tokenizer", work / "prose")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    streams = {d: encoded(tokenizer, d, work / "prose", work) for d in DOMAINS}
    if not (arguments.store_only or arguments.preview):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        plan = Plan(steps=arguments.steps, seed=arguments.seed)
        training = {domain: stream["train"] for domain, stream in streams.items()}
        train(training, plan, work / "state.pt", device)
    _store(work, into, streams, every=8 if arguments.preview else 1)
    if arguments.ship:
        ship(into, PACKAGE)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="directory of everything kept")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ship", action="store_true", help="put the result into the package")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--store-only", action="store_true", help="store what was trained so far")
    instead.add_argument(
        "--preview",
        type=Path,
        metavar="DIR",
        help="store what was trained so far there; the report takes one row in eight",
    )
    return parser.parse_args()


def _store(
    work: Path, into: Path, streams: Mapping[str, Mapping[str, np.ndarray]], every: int
) -> None:
    """Writes ``bf16``, ``fp8``, ``held_out`` and ``training.json``, and prints the report."""
    model, steps = load_state(work / "state.pt")
    store_bf16(model, work / "tokenizer", into / "bf16")
    store_fp8(into / "bf16", into / "fp8")
    write_held_out(work / "prose", into / "held_out")
    record: dict[str, Any] = training_record(into / "fp8", into / "held_out", streams, steps, every)
    write_json(into / "training.json", record)
    print(table(record))


if __name__ == "__main__":
    main()
