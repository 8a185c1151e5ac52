"""What a run leaves in writing: the summary people see, run.json, and the card's facts."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from reap_stream.calibration.corpus import Corpus
from reap_stream.choice_record import choice_notes
from reap_stream.model.opened import OpenedModel
from reap_stream.preparation import Preparation
from reap_stream.ranks.base import ALONE, Ranks
from reap_stream.resident import gib, peak_device_nbytes, peak_resident_nbytes
from reap_stream.scoring.saliency import LayerStats, unreached

DECIDING = ("reap-stream", "torch", "transformers")
"""Packages that decide what a forward gives, to its last bits."""
_PACKAGES = (*DECIDING, "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class Summary:
    """What a job did.

    Attributes:
        seconds: wall time.
        read_nbytes: bytes read from the source into memory or copied from it.
        written_nbytes: bytes written.
        peak_nbytes: largest resident memory of the process, or of one of several.
        device_nbytes: largest device memory of such a process; 0 where none was used.
        details: the rest of run.json.
    """

    seconds: float
    read_nbytes: int
    written_nbytes: int
    peak_nbytes: int
    device_nbytes: int
    details: Mapping[str, Any]

    def line(self) -> str:
        """The last line of a command."""
        device = f" (device {gib(self.device_nbytes)})" if self.device_nbytes else ""
        ranks = self.details.get("ranks")
        several = ""
        if ranks:
            together = gib(sum(ranks["peak_resident_nbytes"]))
            several = f" in the largest of {ranks['count']} ranks, {together} in all"
        return (
            f"{self.seconds:.1f} s · peak memory {gib(self.peak_nbytes)}{device}{several} · "
            f"read {self.read_nbytes / 1e9:.2f} GB · wrote {self.written_nbytes / 1e9:.2f} GB"
        )

    def notes(self) -> list[str]:
        """What the user should know beside the figures."""
        notes = list(self.details.get("calibration", {}).get("notes", []))
        notes += self.details.get("mtp", {}).get("notes", [])
        other = self.details.get("settings", {}).get("scores_of_other_weights")
        if other:
            notes.append(
                f"the scores are of other weights (fingerprint {other[:12]}…): that they are of "
                "this model is taken from the command line"
            )
        unreached = self.details.get("unreached_experts", {})
        if unreached:
            count = sum(len(experts) for experts in unreached.values())
            notes.append(
                f"{count} experts in {len(unreached)} layers were reached by no calibration token "
                "and score 0: they go first (listed in reap/run.json)"
            )
        for keep, serving in self.details.get("serving", {}).items():
            notes.extend(serving["warnings"])
            changed = serving["activation_scale_changes"]
            if changed:
                notes.append(
                    f"keep {keep}: the largest static activation scale went with its expert in "
                    f"{len(changed)} places (listed in reap/run.json)"
                )
        notes.extend(choice_notes(self.details))
        idle = self.details.get("ranks", {}).get("tokens", []).count(0)
        if idle:
            notes.append(
                f"{idle} of {self.details['ranks']['count']} ranks had no batch of calibration rows "
                "to run: smaller --batch-tokens, or fewer ranks"
            )
        lost = sum(self.details.get("non_finite_outputs", {}).values())
        if lost:
            notes.append(f"{lost} expert outputs were not finite and were left out of the scores")
        return notes

    def document(self) -> bytes:
        """reap/run.json."""
        values = {
            **self.details,
            "seconds": round(self.seconds, 3),
            "read_nbytes": self.read_nbytes,
            "written_nbytes": self.written_nbytes,
            "peak_resident_nbytes": self.peak_nbytes,
            "peak_device_nbytes": self.device_nbytes,
        }
        return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def summarize(
    *,
    seconds: float,
    read_nbytes: int,
    written_nbytes: int,
    details: Mapping[str, Any],
    ranks: Ranks = ALONE,
    tokens: int = 0,
) -> Summary:
    """A summary as of now, of all ranks together.

    Args:
        seconds: wall time.
        read_nbytes: bytes that this rank read.
        written_nbytes: bytes that it wrote.
        details: the rest of run.json.
        ranks: the ranks.
        tokens: calibration tokens that this rank ran.
    """
    own = {
        "tokens": tokens,
        "read_nbytes": read_nbytes,
        "written_nbytes": written_nbytes,
        "peak_resident_nbytes": peak_resident_nbytes(),
        "peak_device_nbytes": peak_device_nbytes(),
    }
    everyone = ranks.share(own)
    found = {name: [facts[name] for facts in everyone] for name in own}
    if ranks.size > 1:
        machines = [len(machine) for machine in ranks.machines]
        details = {**details, "ranks": {"count": ranks.size, "of_machines": machines, **found}}
    return Summary(
        seconds,
        sum(found["read_nbytes"]),
        sum(found["written_nbytes"]),
        max(found["peak_resident_nbytes"]),
        max(found["peak_device_nbytes"]),
        details,
    )


def versions() -> dict[str, str]:
    """Versions of what decides results."""
    found = {name: version(name) for name in _PACKAGES}
    return {**found, "python": platform.python_version(), "platform": sys.platform}


def run_details(ready: Preparation, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of run.json that is known before the pass."""
    return {
        "format_version": 1,
        "versions": versions(),
        "settings": dict(settings),
        "source": source_record(ready.model),
        "calibration": calibration_details(ready.corpus),
        "mtp": ready.mtp.record(ready.model),
        "memory": {
            "budget_nbytes": ready.memory.budget,
            "predicted_peak_nbytes": ready.memory.peak_host,
            "expert_slots": ready.memory.expert_slots,
            "hidden_states_in_file": ready.memory.spill,
        },
    }


def calibration_details(corpus: Corpus) -> dict[str, Any]:
    """What identifies the calibration data."""
    return {
        "sources": list(corpus.sources),
        "rows": len(corpus.rows),
        "tokens": corpus.num_tokens,
        "sha256": corpus.sha256,
        "origins": [origin.record() for origin in corpus.origins],
        "notes": list(corpus.notes),
    }


def source_record(model: OpenedModel) -> dict[str, Any]:
    """What identifies the source."""
    origin = model.checkpoint.origin
    known = {} if origin is None else asdict(origin)
    return {
        **known,
        "path": str(model.checkpoint.directory),
        "fingerprint": model.checkpoint.fingerprint,
        "architecture": model.architecture.name,
        "nbytes": model.checkpoint.nbytes,
    }


def unreached_experts(layers: Mapping[int, LayerStats | None]) -> dict[str, list[int]]:
    """Layer → experts that no calibration token was sent to."""
    found = {i: unreached(stats) for i, stats in sorted(layers.items()) if stats is not None}
    return {str(layer): experts for layer, experts in found.items() if experts}
