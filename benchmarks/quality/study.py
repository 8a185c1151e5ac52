"""Where a study takes its model and tokens from, and where it keeps what it makes.

Experts are scored on the demo's training tokens and candidates compared on the tokens that its
training held out; both are the files that `benchmarks/train_demo.py` leaves in its directory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.model.opened import OpenedModel, open_model

DOMAINS = ("python", "prose", "tools")
SEED = 0
ROW_TOKENS = 512
CALIBRATION_ROWS = 96
# Held-out text is cut into folds, each with as many tokens of every domain: how far figures differ
# between them says how much they owe to the text.
FOLDS, FOLD_ROWS = 8, 2

SIZES = {
    "seed": SEED,
    "row_tokens": ROW_TOKENS,
    "calibration_rows": CALIBRATION_ROWS,
    "folds": FOLDS,
    "fold_rows": FOLD_ROWS,
}

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Study:
    """One model and its texts.

    Attributes:
        model: the checkpoint that is pruned.
        bf16: the same model before it was quantised; None where no question needs it.
        tokens: directory with DOMAIN-train.npy and DOMAIN-held-out.npy, read only.
        output: directory of everything made on the way.
    """

    model: Path
    bf16: Path | None
    tokens: Path
    output: Path

    @cached_property
    def opened(self) -> OpenedModel:
        """The checkpoint's headers and architecture."""
        return open_model(self.model)

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer."""
        return self.opened.architecture.num_experts

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """Fingerprints of the model and of all tokens, and how much text is used."""
        digest = hashlib.sha256()
        for domain in DOMAINS:
            for part in ("train", "held-out"):
                digest.update(self.stream(domain, part).astype("<i8").tobytes())
        model = self.opened.checkpoint.fingerprint
        return {"model": model, "tokens": digest.hexdigest(), "sizes": SIZES}

    @cached_property
    def twin(self) -> str | None:
        """The fingerprint of the bfloat16 model, where there is one."""
        return None if self.bf16 is None else open_checkpoint(self.bf16).fingerprint

    @cached_property
    def scratch(self) -> Path:
        """Where what is made of these models and tokens is kept."""
        parts = [self.made_from["model"], self.twin or "none", self.made_from["tokens"]]
        directory = self.output / "-".join(part[:8] for part in parts)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def stream(self, domain: str, part: str) -> NDArray[np.int32]:
        """Tokens of a domain, ``train`` or ``held-out`` [tokens]."""
        stream: NDArray[np.int32] = np.load(self.tokens / f"{domain}-{part}.npy", mmap_mode="r")
        return stream

    def windows(self, domain: str, part: str, width: int) -> Tokens:
        """All rows of a stream that do not overlap, in an order drawn by chance [rows, width]."""
        stream = self.stream(domain, part)
        rows = np.array(stream[: len(stream) // width * width], np.int64).reshape(-1, width)
        key = [SEED, DOMAINS.index(domain), width]
        return np.random.default_rng(key).permutation(rows)

    def save_rows(self, name: str, rows: Tokens) -> str:
        """Writes rows where the engine can read them.

        Returns:
            Their SPEC, whose `label` is the name.
        """
        path = self.scratch / "rows" / f"{name}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, rows)
        return str(path)

    def calibration(self) -> tuple[str, ...]:
        """SPECs of the training text that experts are scored on, one a domain."""
        return tuple(
            self.save_rows(
                f"calibration-{d}", self.windows(d, "train", ROW_TOKENS)[:CALIBRATION_ROWS]
            )
            for d in DOMAINS
        )

    def held_out(self) -> tuple[str, ...]:
        """SPECs of the text that candidates are compared on, one a domain and fold."""
        specs = []
        for domain in DOMAINS:
            rows = self.windows(domain, "held-out", ROW_TOKENS)
            for fold in range(FOLDS):
                part = rows[fold * FOLD_ROWS : (fold + 1) * FOLD_ROWS]
                specs.append(self.save_rows(f"held-out-{domain}-{fold}", part))
        return tuple(specs)


def label(spec: str) -> str:
    """The name of rows that `Study.save_rows` wrote."""
    return Path(spec).stem
