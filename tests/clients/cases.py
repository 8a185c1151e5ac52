"""What is pruned and given to the clients."""

from __future__ import annotations

from dataclasses import dataclass

from tests.clients.checkpoints import Source


@dataclass(frozen=True)
class Case:
    """One pruned checkpoint.

    Attributes:
        source: what is pruned; it has 8 experts a layer.
        keep: how many stay.
        mtp: ``--mtp``.
        weights: ``--weights``.
    """

    source: Source
    keep: int
    mtp: str = "match"
    weights: str = "keep"

    def __str__(self) -> str:
        mtp = f"-mtp-{self.mtp}" if self.source.mtp else ""
        weights = "" if self.weights == "keep" else f"-to-{self.weights}"
        return f"{self.source.family}-{self.source.weights}{weights}{mtp}-{self.keep}"


QWEN = Case(Source("qwen3_moe"), 6)
GLM_CHANNEL = Case(Source("glm4_moe", "fp8-channel", mtp=True), 6)
# Those that every client reads, and those for the clients that read FP8.
BF16 = [
    QWEN,
    Case(Source("qwen3_moe"), 5),
    Case(Source("glm4_moe"), 7),
    Case(Source("glm4_moe", mtp=True), 6),
    Case(Source("glm4_moe", mtp=True), 5, "drop"),
    Case(Source("glm4_moe", "fp8-channel", mtp=True), 5, "score", weights="bf16"),
]
FP8 = [
    Case(Source("qwen3_moe", "fp8-block"), 5),
    Case(Source("qwen3_moe", "fp8-channel"), 6),
    Case(Source("glm4_moe", "fp8-block", mtp=True), 5),
    GLM_CHANNEL,
    Case(Source("qwen3_moe"), 5, weights="fp8"),
    Case(Source("glm4_moe", mtp=True), 6, "score", weights="fp8-channel"),
]
