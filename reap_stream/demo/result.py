"""What the demo found, and how people see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reap_stream.resident import gib


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the demo.

    Attributes:
        label: what was done to it.
        experts: routed experts a layer.
        parameters: of the model.
        nbytes: of all its tensors; None where it was never written.
        losses: domain → mean loss on held-out text, in nats a token.
        kl: mean KL divergence of its predictions from the original's, in nats.
        top1: share of tokens at which both find the same token the likeliest.
    """

    label: str
    experts: int
    parameters: int
    nbytes: int | None
    losses: Mapping[str, float]
    kl: float
    top1: float

    def line(self) -> str:
        """The row of the table."""
        nbytes = "" if self.nbytes is None else f"{self.nbytes:,}"
        losses = "".join(f"{loss:8.3f}" for loss in self.losses.values())
        return (
            f"{self.label:16}{self.experts:8}{self.parameters:13,}{nbytes:>13}{losses}"
            f"{self.kl:8.3f}{self.top1:8.1%}"
        )


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demo did.

    Attributes:
        rows: the original, then each pruned model.
        calibration: record of the calibration.
        agreement: share of the kept experts that both halves of its rows would keep, of the
            smallest model; None where there are no two halves.
        evaluated_tokens: of held-out text.
        tensors: compared with the source, in all pruned checkpoints.
        verified_nbytes: theirs.
        prune_seconds: wall time of scoring and writing.
        seconds: wall time of everything.
        peak_nbytes: largest resident memory of the process.
    """

    rows: tuple[Row, ...]
    calibration: Mapping[str, Any]
    agreement: float | None
    evaluated_tokens: int
    tensors: int
    verified_nbytes: int
    prune_seconds: float
    seconds: float
    peak_nbytes: int

    def table(self) -> str:
        """The summary people see."""
        domains = "".join(f"{domain:>8}" for domain in self.rows[0].losses)
        head = f"{'':16}{'experts':>8}{'parameters':>13}{'bytes':>13}{domains}{'KL':>8}{'top-1':>8}"
        tokens = f"{self.calibration['tokens']:,} tokens"
        halves = "" if self.agreement is None else f"; two halves agree on {self.agreement:.1%}"
        facts = [
            ("calibration", f"{tokens} of {', '.join(self.calibration['sources'])}{halves}"),
            ("evaluation", f"{self.evaluated_tokens:,} tokens of held-out text"),
            ("verified", f"{self.tensors:,} tensors, {self.verified_nbytes:,} bytes"),
            ("seconds", f"{self.seconds:.1f}, of which pruning {self.prune_seconds:.1f}"),
            ("peak memory", f"{gib(self.peak_nbytes)}, Python and torch included"),
        ]
        return "\n".join(
            [head, *(row.line() for row in self.rows), ""]
            + [f"{name:14}{text}" for name, text in facts]
        )


def introduction(record: Mapping[str, Any]) -> str:
    """What is about to happen, and what it does not show.

    Args:
        record: see `reap_stream.demo.data.training_record`.
    """
    millions = f"{record['parameters'] / 1e6:.0f} M"
    tokens = f"{record['training_tokens'] / 1e6:.0f} M"
    return (
        f"A Glm4MoeForCausalLM of {millions} parameters, in FP8, trained on {tokens} tokens of "
        "Python source, English\nprose and tool calls: 5 layers of 32 experts, 4 a token. It is "
        "pruned to three sizes in one pass, each\nis compared with the source byte by byte, and "
        "all are run on text held out of training.\nSo small a model, trained so briefly: "
        "what it loses says little about what yours would lose.\n"
        'Losses in nats a token; KL and top-1 against the original; "by chance" shows what '
        "the scores are worth."
    )
