"""What a command was told, checked and frozen, before anything is opened."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reap_stream.calibration.schemas import check_field_map
from reap_stream.checkpoint.providers import model_name
from reap_stream.errors import UsageError

_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12,
    "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip

MTP_CHOICES = ("score", "match", "keep", "drop")
WEIGHT_CHOICES = ("keep", "fp8", "fp8-channel", "bf16")


def parse_nbytes(text: str) -> int:
    """Reads a number of bytes such as ``8GiB``, ``5GB`` or ``500000000``.

    Raises:
        UsageError: it is none, or zero.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    nbytes = int(float(match[1]) * unit) if match and unit else 0
    if nbytes <= 0:
        message = f"{text!r} is not a number of bytes; write 8GiB, 5GB or 5000000000"
        raise UsageError(message)
    return nbytes


@dataclass(frozen=True)
class ChoiceSettings:
    """How experts are chosen from their statistics.

    Attributes:
        method: the criterion.
        seed: of the criterion ``random``.
        source_weights: label and weight of calibration sources; others weigh 1.
        protect: which experts stay whatever their score: ``none`` or ``super``.
    """

    method: str = "reap"
    seed: int = 0
    source_weights: tuple[tuple[str, float], ...] = ()
    protect: str = "none"

    def record(self) -> dict[str, Any]:
        """The settings as JSON values; weights as an object of labels."""
        return {**asdict(self), "source_weights": dict(self.source_weights)}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a model is run on calibration data.

    Attributes:
        model: directory of the checkpoint.
        calibration: SPECs, as given.
        method: how experts are scored.
        samples: the most rows of a SPEC without its own number.
        sequence_length: the most tokens of a row.
        batch_tokens: tokens that run together; None: chosen by memory.
        seed: of every random choice.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
        compute_dtype: ``auto``, ``bfloat16`` or ``float32``.
        memory: host memory budget in bytes; None: what the machine has.
        propagate: ``original`` or ``pruned``: whose activations later layers see.
        source_weights: as in `ChoiceSettings`.
        protect: as in `ChoiceSettings`.
        trust_remote_code: let the checkpoint's own code run.
        progress: show progress bars.
        pack: numbers of rows count packs of `sequence_length` tokens.
        field_map: pairs of what records are made of and the field that holds it; see
            `parse_field_map`.
    """

    model: Path
    calibration: tuple[str, ...]
    method: str = "reap"
    samples: int | None = 512
    sequence_length: int = 2048
    batch_tokens: int | None = None
    seed: int = 0
    device: str = "auto"
    compute_dtype: str = "auto"
    memory: int | None = None
    propagate: str = "original"
    source_weights: tuple[tuple[str, float], ...] = ()
    protect: str = "none"
    trust_remote_code: bool = False
    progress: bool = True
    pack: bool = False
    field_map: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuses values that cannot be."""
        check_field_map(self.field_map)
        if self.batch_tokens is not None and self.batch_tokens < 1:
            message = f"--batch-tokens is {self.batch_tokens}, must be at least 1"
            raise UsageError(message)
        if not self.calibration:
            message = "no calibration data; give --calibration builtin or a file"
            raise UsageError(message)
        if self.propagate == "pruned" and self.protect != "none":
            message = (
                f"--protect {self.protect} is known once all layers are scored, and --propagate "
                "pruned prunes each layer before the next is scored: give one of the two"
            )
            raise UsageError(message)

    @property
    def choice(self) -> ChoiceSettings:
        """How experts are chosen."""
        return ChoiceSettings(self.method, self.seed, self.source_weights, self.protect)

    def record(self) -> dict[str, Any]:
        """The settings as JSON values, those that decide the result and those that do not."""
        values = asdict(self)
        values["model"] = model_name(self.model)
        values["calibration"] = list(self.calibration)
        values["field_map"] = dict(self.field_map)
        values["source_weights"] = dict(self.source_weights)
        del values["progress"]
        return values


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What is written, and where.

    Attributes:
        output: directory of the pruned checkpoint, or of one for each target.
        sparsity: comma-separated fractions to remove, or None.
        keep: comma-separated counts to keep, or None.
        weights: in which format kept weights are written.
        fp8_experts_only: only routed experts are written in that format.
        max_shard_nbytes: most bytes of a shard.
        mtp: what happens to next-token-prediction layers, one of `MTP_CHOICES`; None: ``score``
            where they can be run, else ``match``.
        overwrite: replace an existing output.
        resume: go on with a half-done job.
        snapshot_seconds: least time between two snapshots of the hidden states.
    """

    output: Path
    sparsity: str | None = None
    keep: str | None = None
    weights: str = "keep"
    fp8_experts_only: bool = False
    max_shard_nbytes: int = 5 * 10**9
    mtp: str | None = None
    overwrite: bool = False
    resume: bool = False
    snapshot_seconds: float = 300.0

    def __post_init__(self) -> None:
        """Refuses combinations that this version cannot carry out."""
        if self.overwrite and self.resume:
            message = "--overwrite starts anew and --resume goes on: give one of them"
            raise UsageError(message)
        if self.fp8_experts_only and not self.weights.startswith("fp8"):
            message = (
                f"--fp8-experts-only says what --weights fp8 and fp8-channel leave alone; it has "
                f"no meaning with --weights {self.weights}"
            )
            raise UsageError(message)

    def record(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON values."""
        return {
            "sparsity": self.sparsity,
            "keep": self.keep,
            "weights": self.weights,
            "fp8_experts_only": self.fp8_experts_only,
            "max_shard_nbytes": self.max_shard_nbytes,
            "mtp": self.mtp or "score",
        }


@dataclass(frozen=True)
class Candidate:
    """A pruning of a model that was never written, to be evaluated.

    Attributes:
        scores: file of `observe`, `merge` or a pruned checkpoint, taken on the model.
        keep: experts that stay in every layer; None: as `sparsity` says.
        choice: how they are chosen from the scores.
        label: what it is called in results; empty: made of the rest.
        sparsity: fraction of routed experts to remove, a decimal; None: as `keep` says.
    """

    scores: Path
    keep: int | None = None
    choice: ChoiceSettings = field(default_factory=ChoiceSettings)
    label: str = ""
    sparsity: str | None = None

    def __post_init__(self) -> None:
        """Refuses two targets, or none."""
        if (self.keep is None) == (self.sparsity is None):
            message = f"candidate of {self.scores}: give either keep or sparsity"
            raise UsageError(message)


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What is evaluated, and on what.

    Attributes:
        models: directories of checkpoints; all are compared with the first.
        text: SPECs, as given.
        candidates: prunings of the first model that were never written.
        samples: the most rows of a SPEC without its own number.
        sequence_length: the most tokens of a row.
        batch_tokens: tokens that run together; None: chosen by memory.
        seed: of the draw of rows.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
        compute_dtype: ``auto``, ``bfloat16`` or ``float32``; ``auto`` as suits the first model.
        memory: host memory budget in bytes; None: what the machine has.
        scratch: directory for hidden states that memory has no room for; None: the system's.
        trust_remote_code: let the checkpoints' own code run.
        progress: show progress bars.
        pack: numbers of rows count packs of `sequence_length` tokens.
        field_map: as in `RunSettings`.
    """

    models: tuple[Path, ...]
    text: tuple[str, ...]
    candidates: tuple[Candidate, ...] = ()
    samples: int | None = 512
    sequence_length: int = 2048
    batch_tokens: int | None = None
    seed: int = 0
    device: str = "auto"
    compute_dtype: str = "auto"
    memory: int | None = None
    scratch: Path | None = None
    trust_remote_code: bool = False
    progress: bool = True
    pack: bool = False
    field_map: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuses what could not be compared."""
        if not self.models:
            message = "no model to evaluate: give the directory of a checkpoint"
            raise UsageError(message)
        if not self.text:
            message = "no text to evaluate on: give --text with a file"
            raise UsageError(message)
        repeated = [path for path in self.models if self.models.count(path) > 1]
        if repeated:
            message = f"{repeated[0]} is given twice: leave one out"
            raise UsageError(message)

    def run(self, model: Path) -> RunSettings:
        """How one of the models is run on the text."""
        return RunSettings(
            model=model,
            calibration=self.text,
            samples=self.samples,
            sequence_length=self.sequence_length,
            batch_tokens=self.batch_tokens,
            seed=self.seed,
            device=self.device,
            compute_dtype=self.compute_dtype,
            memory=self.memory,
            trust_remote_code=self.trust_remote_code,
            progress=self.progress,
            pack=self.pack,
            field_map=self.field_map,
        )
