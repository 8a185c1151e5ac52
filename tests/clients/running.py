"""Runs a client on a checkpoint and compares what it says; damages checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.builders import load_tensors, read_config, write_checkpoint
from tests.clients.make_env import DEFAULT_INTO
from tests.clients.reference import Expected, Rows

ENVIRONMENTS = Path(os.environ.get("REAP_STREAM_CLIENTS", DEFAULT_INTO))
TOLERANCE = 1e-4
SECONDS = 300
_LOG_END = 3000


@dataclass(frozen=True)
class Answer:
    """What a client's script left.

    Attributes:
        status: its exit status.
        arrays: ``row_N`` and perhaps ``draft_N``, [tokens, vocabulary] each; empty if it failed.
        log: its output.
    """

    status: int
    arrays: dict[str, np.ndarray[Any, Any]]
    log: str


def ask(client: str, checkpoint: Path, prompts: Rows, scratch: Path, *options: str) -> Answer:
    """Has a client compute log-probabilities, in a fresh process of its own environment.

    Args:
        client: a name of make_env.CLIENTS.
        checkpoint: the directory to load.
        prompts: token arrays [tokens].
        scratch: an existing directory for what goes in and comes out.
        options: more arguments of the client's script.
    """
    python = ENVIRONMENTS / client / "bin" / "python"
    assert python.exists(), f"no {python}: run tests/clients/make_env.py --into {ENVIRONMENTS}"
    tokens, out = scratch / f"{client}.json", scratch / f"{client}.npz"
    tokens.write_text(json.dumps([prompt.tolist() for prompt in prompts]), encoding="utf-8")
    out.unlink(missing_ok=True)
    script = Path(__file__).with_name(f"{client}_logprobs.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "2", "XDG_CACHE_HOME": str(scratch / "cache")}
    done = subprocess.run(
        [python, script, checkpoint, tokens, out, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=SECONDS,
        check=False,
    )
    arrays = dict(np.load(out)) if done.returncode == 0 else {}
    return Answer(done.returncode, arrays, done.stdout.decode(errors="replace"))


def assert_agrees(answer: Answer, expected: Expected, drafts: bool = False) -> dict[str, float]:
    """Every log-probability within TOLERANCE, every likeliest token the same.

    Returns:
        The largest difference of the rows, and of the drafts if they are compared.
    """
    assert answer.status == 0, answer.log[-_LOG_END:]
    parts = {"row": expected.rows} | ({"draft": expected.drafts} if drafts else {})
    largest = {}
    for part, wanted in parts.items():
        assert wanted
        found = [answer.arrays[f"{part}_{number}"] for number in range(len(wanted))]
        largest[part] = max(
            _difference(mine, theirs) for mine, theirs in zip(found, wanted, strict=True)
        )
        assert largest[part] <= TOLERANCE, (part, largest[part])
        for mine, theirs in zip(found, wanted, strict=True):
            assert (mine.argmax(axis=1) == theirs.argmax(axis=1)).all()
    return largest


def largest_difference(answer: Answer, expected: Expected) -> float:
    """Of all rows; infinite where the client says what is no number."""
    assert answer.status == 0, answer.log[-_LOG_END:]
    return max(
        _difference(answer.arrays[f"row_{number}"], row) for number, row in enumerate(expected.rows)
    )


def _difference(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max()) if np.isfinite(found).all() else float("inf")


def damage(
    checkpoint: Path, directory: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    """A copy of a checkpoint whose tensors went through `change`."""
    tensors = load_tensors(checkpoint)
    change(tensors)
    write_checkpoint(directory, tensors, read_config(checkpoint))
    (directory / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    return directory


def lose(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Takes a tensor away."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


def swap(one: str, other: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Exchanges two tensors."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        assert not torch.equal(tensors[one], tensors[other])
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change
