"""Trains the model that ships with the package for `reap-stream demo`.

    python benchmarks/train_demo.py --work DIRECTORY

Texts, tokens and the state of the training are kept in DIRECTORY, so that the same command goes on
where it was stopped. A GPU is used if there is one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from demo_model.texts import fetch_prose
from demo_model.tokens import DOMAINS, encoded, make_tokenizer
from demo_model.training import Plan, held_out_loss, train
from transformers import AutoTokenizer


def main() -> None:
    """Fetches, trains, reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="directory of everything kept")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work = arguments.work
    fetch_prose(work / "prose")
    if not (work / "tokenizer").is_dir():
        make_tokenizer(work / "tokenizer", work / "prose")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    streams = {d: encoded(tokenizer, d, work / "prose", work) for d in DOMAINS}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = Plan(steps=arguments.steps, seed=arguments.seed)
    training = {domain: stream["train"] for domain, stream in streams.items()}
    model = train(training, plan, work / "state.pt", device)
    for domain, stream in streams.items():
        print(f"{domain}: held-out loss {held_out_loss(model, stream['held-out']):.4f} nats")


if __name__ == "__main__":
    main()
