"""Where the demo's model and texts lie: beside this file, read and never written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

_HERE: Final = Path(__file__).resolve().parent

MODEL: Final = _HERE / "model"
"""Checkpoint in FP8 with block scales: config, four shards, index, tokenizer."""

HELD_OUT: Final = {
    domain: _HERE / "held_out" / f"{domain}.jsonl" for domain in ("python", "prose", "tools")
}
"""Text that took no part in training, for each domain."""


def training_record() -> dict[str, Any]:
    """What was measured when the model was stored.

    Returns:
        ``steps``, ``training_tokens``, ``parameters``; ``held_out`` and ``shipped``: domain →
        ``tokens`` and the losses of ``model``, ``bigram`` and ``unigram``, on all held-out text and
        on that in `HELD_OUT`; ``routing``: how each layer's experts share the work.
    """
    record: dict[str, Any] = json.loads((_HERE / "training.json").read_bytes())
    return record
