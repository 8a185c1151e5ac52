"""The training loop: mixed batches, AdamW, a warm-up and a cosine, state saved so that it resumes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from demo_model.network import Loads, balance, make_model

WIDTH = 512
MIX = {"python": 0.4, "prose": 0.4, "tools": 0.2}
_WARM_UP = 100
_SAVE_SECONDS = 120.0
_BETAS = (0.9, 0.95)
_WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    Attributes:
        steps: batches.
        rows: rows of 512 tokens in a batch.
        rate: largest learning rate.
        seed: of weights and batches.
    """

    steps: int
    rows: int = 8
    rate: float = 3e-3
    seed: int = 0


def draw(
    streams: Mapping[str, np.ndarray], step: int, plan: Plan, device: torch.device
) -> torch.Tensor:
    """The batch of a step [rows, width + 1]; the same whether or not the run was resumed."""
    rng = np.random.default_rng([plan.seed, step])
    names = rng.choice(list(MIX), plan.rows, p=list(MIX.values()))
    rows = []
    for name in names:
        start = int(rng.integers(0, len(streams[name]) - WIDTH - 1))
        rows.append(streams[name][start : start + WIDTH + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)


def rate_at(step: int, plan: Plan) -> float:
    """Learning rate of a step."""
    if step < _WARM_UP:
        return plan.rate * (step + 1) / _WARM_UP
    done = (step - _WARM_UP) / max(1, plan.steps - _WARM_UP)
    return plan.rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats."""
    logits = model(batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def train(
    streams: Mapping[str, np.ndarray], plan: Plan, state_path: Path, device: torch.device
) -> torch.nn.Module:
    """Trains the model, or goes on where an earlier run stopped.

    Args:
        streams: training tokens of each domain.
        plan: how long.
        state_path: file of the weights, the optimiser's state and the step.
        device: where.
    """
    model = make_model(plan.seed, device)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": _WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.rate, betas=_BETAS, fused=True)
    first = _resume(model, optimizer, state_path)
    loads = Loads(model)
    saved = started = time.monotonic()
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, plan)
        loss = loss_of(model, draw(streams, step, plan, device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        counts = loads.take()
        balance(model, counts)
        if step % 25 == 0:
            speed = (step - first + 1) * plan.rows * WIDTH / (time.monotonic() - started)
            uneven = (counts.max(dim=1).values / counts.float().mean(dim=1)).max().item()
            print(
                f"step {step} loss {loss.item():.3f} {speed:.0f} tokens/s max load {uneven:.1f}",
                flush=True,
            )
        if time.monotonic() - saved > _SAVE_SECONDS or step + 1 == plan.steps:
            _save(model, optimizer, step + 1, state_path)
            saved = time.monotonic()
    return model


def _save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _resume(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)  # noqa: TID251 - this script's own file
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
