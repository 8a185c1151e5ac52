"""What an evaluation found: figures for machines, and tables for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_stream.checkpoint.providers import model_name
from reap_stream.evaluation.metrics import Figures
from reap_stream.records import versions
from reap_stream.resident import gib

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Result:
    """What was found of one candidate.

    Attributes:
        label: what it is called.
        model: directory its weights are from.
        keep: routed experts in each layer.
        choice: how they were chosen and by which scores, as JSON values; empty for a checkpoint as
            it is.
        all: figures over all texts.
        sources: figures of each text, by its SPEC.
        layers: layer → ||h - h_ref|| / ||h_ref|| of the hidden states after it, over all tokens;
            empty of layers that cannot be compared.
        kept_sha256: which experts it has, as `kept_digest` gives it; None: not on record.
        fingerprint: of its directory; None: it was never written, or is on the Hub.
    """

    label: str
    model: Path
    keep: int
    choice: Mapping[str, Any]
    all: Figures
    sources: Mapping[str, Figures]
    layers: Mapping[int, float]
    kept_sha256: str | None = None
    fingerprint: str | None = None

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        identity = {"kept_sha256": self.kept_sha256, "fingerprint": self.fingerprint}
        return {
            "label": self.label,
            "model": model_name(self.model),
            "keep": self.keep,
            **{key: value for key, value in identity.items() if value is not None},
            **self.choice,
            "all": self.all.document(),
            "sources": {text: figures.document() for text, figures in self.sources.items()},
            "layers": [
                {"layer": layer, "relative_error": error if math.isfinite(error) else None}
                for layer, error in self.layers.items()
            ],
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found of all candidates; the first is the reference.

    Attributes:
        results: one for each candidate.
        text: what they were evaluated on, as JSON values: sources, rows, tokens, sha256.
        settings: how they were run, as JSON values.
        seconds: wall time.
        read_nbytes: bytes read from the checkpoints.
        predicted_nbytes: peak of resident memory as it was planned.
        peak_nbytes: largest resident memory of the process.
        device_nbytes: largest device memory of the process; 0 where none was used.
        notes: what to know beside the figures.
    """

    results: tuple[Result, ...]
    text: Mapping[str, Any]
    settings: Mapping[str, Any]
    seconds: float
    read_nbytes: int
    predicted_nbytes: int
    peak_nbytes: int
    device_nbytes: int
    notes: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """As JSON values; figures that are no finite number are None, and the notes say so."""
        return {
            "format_version": FORMAT_VERSION,
            "versions": versions(),
            "text": dict(self.text),
            "settings": dict(self.settings),
            "seconds": round(self.seconds, 3),
            "read_nbytes": self.read_nbytes,
            "predicted_peak_nbytes": self.predicted_nbytes,
            "peak_resident_nbytes": self.peak_nbytes,
            "peak_device_nbytes": self.device_nbytes,
            "notes": [*self.notes, *self._infinite()],
            "candidates": [result.document() for result in self.results],
        }

    def table(self) -> str:
        """The errors layer by layer, then the figures of each text and of all."""
        blocks = [*self._layer_block(), *self._figure_blocks()]
        notes = [f"note: {note}" for note in (*self.notes, *self._infinite())]
        return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])

    def line(self) -> str:
        """The last line of the command."""
        device = f" (device {gib(self.device_nbytes)})" if self.device_nbytes else ""
        return (
            f"{self.seconds:.1f} s · peak memory {gib(self.peak_nbytes)}{device} · "
            f"read {self.read_nbytes / 1e9:.2f} GB"
        )

    def _layer_block(self) -> Iterator[str]:
        others = self.results[1:]
        layers = sorted({layer for result in others for layer in result.layers})
        if not layers:
            return
        rows = [("layer", *(result.label for result in others))]
        for layer in layers:
            errors = (result.layers.get(layer) for result in others)
            rows.append((str(layer), *("-" if e is None else f"{e:.4f}" for e in errors)))
        title = f"relative error of hidden states after each layer, against {self.results[0].label}"
        yield "\n".join([title, *_aligned(rows)])

    def _figure_blocks(self) -> Iterator[str]:
        sources = list(self.results[0].sources)
        for text in sources if len(sources) > 1 else ():
            yield self._figures(text, [result.sources[text] for result in self.results])
        title = "all" if len(sources) > 1 else sources[0]
        yield self._figures(title, [result.all for result in self.results])

    def _figures(self, title: str, figures: Sequence[Figures]) -> str:
        rows = [("candidate", "experts", "loss", "perplexity", "KL", "same top-1")]
        for result, own in zip(self.results, figures, strict=True):
            shown = (f"{own.loss:.4f}", f"{own.perplexity:.4g}", f"{own.kl:.4f}")
            agreed = f"{100 * own.top1_agreement:.2f} %"
            rows.append((result.label, str(result.keep), *shown, agreed))
        return "\n".join([f"{title} ({figures[0].tokens} tokens predicted)", *_aligned(rows)])

    def _infinite(self) -> Iterator[str]:
        for result in self.results:
            for text, own in (("all", result.all), *result.sources.items()):
                values = (own.loss, own.perplexity, own.kl, own.top1_agreement)
                if not all(map(math.isfinite, values)):
                    yield f"{result.label}, {text}: not all figures are finite numbers"
            layers = [i for i, error in result.layers.items() if not math.isfinite(error)]
            if layers:
                yield f"{result.label}: no relative error of layers {layers}: the reference is 0"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns as wide as their widest cell: the first to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
