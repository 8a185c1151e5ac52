"""How calibration rows are made and drawn: as the user set it, and what goes with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reap_stream.calibration.encoding import TextEncoder
from reap_stream.calibration.sampling import MIN_ROW_TOKENS
from reap_stream.calibration.schemas import check_field_map
from reap_stream.calibration.spec import CalibrationSpec
from reap_stream.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """How rows are made and drawn, the same for all SPECs.

    Attributes:
        samples: the most rows, or packs, of a SPEC without its own number; None for all.
        sequence_length: the most tokens of a row, and those of a pack. Records are cut there; a
            ``.txt`` file and built-in documents go on in the next row.
        seed: of the draw where a SPEC has more rows than asked for, 0 or more.
        pack: let numbers count packs, and let records go on in the next row; see `packing`.
        field_map: pairs of target and field, as `parse_field_map` reads them, for records that
            have these fields.

    Raises:
        UsageError: numbers out of range, or a map that says nothing.
    """

    samples: int | None
    sequence_length: int
    seed: int
    pack: bool = False
    field_map: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuses values that cannot be."""
        if self.sequence_length < MIN_ROW_TOKENS:
            raise UsageError(
                f"sequence length {self.sequence_length} is too short: at least {MIN_ROW_TOKENS}"
                " tokens"
            )
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"cannot take {self.samples} samples: at least 1")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is negative: give 0 or more")
        check_field_map(self.field_map)

    @property
    def most_tokens(self) -> int | None:
        """Where a record is cut; None: nowhere, since it goes on in the next row."""
        return None if self.pack else self.sequence_length

    def limit(self, spec: CalibrationSpec) -> int | None:
        """The most rows or packs of a SPEC."""
        return self.samples if spec.rows is None else spec.rows


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings, and what goes with the model.

    Attributes:
        encoder: makes token ids of text; None if the model has no tokenizer.
        vocab_size: ids the model knows.
        rows: the settings.
        field_map: their pairs by target.
        mapped: receives the SPECs in whose records the map's fields are.
    """

    encoder: TextEncoder | None
    vocab_size: int
    rows: RowSettings
    field_map: Mapping[str, str]
    mapped: set[str] = field(default_factory=set)
