"""Log-probabilities of a checkpoint's prompts by mlx-lm on a CPU in float32.

    python mlx_logprobs.py DIR TOKENS.json OUT.npz

Runs in mlx-lm's own environment (make_env.py) and imports nothing of the tests. OUT.npz: ``row_N``
[tokens, vocabulary].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model


def main(directory: str, tokens: str, out: str) -> None:
    """Loads the checkpoint, widens its weights, and writes the arrays."""
    mx.set_default_device(mx.cpu)
    prompts: list[list[int]] = json.loads(Path(tokens).read_text(encoding="utf-8"))
    model, _ = load_model(Path(directory), lazy=False)
    model.set_dtype(mx.float32)
    rows = [np.array(model(mx.array([prompt]))[0]).astype(np.float64) for prompt in prompts]
    peaks = [row - row.max(axis=1, keepdims=True) for row in rows]
    logprobs = [row - np.log(np.exp(row).sum(axis=1, keepdims=True)) for row in peaks]
    np.savez(out, **{f"row_{number}": row for number, row in enumerate(logprobs)})


if __name__ == "__main__":
    main(*sys.argv[1:4])
