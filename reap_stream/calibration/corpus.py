"""All calibration rows of a run: what every SPEC gives, counted and fingerprinted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reap_stream.calibration.encoding import TextEncoder, Tokens
from reap_stream.calibration.rules import RowSettings, Rules
from reap_stream.calibration.sources import Loaded, Source, open_source
from reap_stream.calibration.spec import CalibrationSpec
from reap_stream.errors import CalibrationError, UsageError


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One calibration row.

    Attributes:
        tokens: int64 [tokens].
        source: number of its SPEC, an index into `Corpus.sources`.
    """

    tokens: Tokens
    source: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the rows of one SPEC came from, and their fingerprint.

    Attributes:
        source: the SPEC's text.
        kind: ``file``, ``builtin`` or ``hub``.
        name: path, name of the built-in text, or id of the data set.
        config: the data set's configuration that was read.
        split: its split that was read.
        revision: its commit that was read.
        reader: the library that read it, and its version.
        seen: rows or documents that were drawn from; of a Hub data set, those looked at.
        rows: rows taken.
        tokens: of these rows.
        sha256: of their token ids and boundaries, in hexadecimal.
    """

    source: str
    kind: str
    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    reader: str | None = None
    seen: int
    rows: int
    tokens: int
    sha256: str

    def record(self) -> dict[str, Any]:
        """The attributes that have a value, for run records."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Corpus:
    """All calibration rows.

    Attributes:
        rows: in the order of the SPECs and, within one, of its data.
        sources: the SPECs' texts, which label the scores.
        sha256: of all token ids and row boundaries, in hexadecimal.
        num_tokens: tokens of all rows.
        notes: what the user should know: rows skipped, or fewer than were asked for.
        origins: where the rows of each SPEC came from.
    """

    rows: list[TokenRow]
    sources: tuple[str, ...]
    sha256: str
    num_tokens: int
    notes: tuple[str, ...]
    origins: tuple[Origin, ...]


def load_corpus(
    specs: Sequence[CalibrationSpec],
    tokenizer: Callable[..., Any] | None,
    vocab_size: int,
    settings: RowSettings,
) -> Corpus:
    """Read, draw and encode the rows that the SPECs name.

    Args:
        specs: at least one, no text twice.
        tokenizer: a transformers tokenizer; None if the model has none, which ``.npy`` allows.
        vocab_size: ids the model knows; every id must be below.
        settings: how rows are made and drawn.

    Returns:
        The rows, the same for the same arguments and data.

    Raises:
        UsageError: no SPEC, a SPEC twice, or a file of another kind.
        CalibrationError: data that is missing, malformed, empty or does not fit the model.
    """
    _check_specs(specs)
    encoder = None if tokenizer is None else TextEncoder(tokenizer, vocab_size)
    rules = Rules(encoder, vocab_size, settings, dict(settings.field_map))
    # All are opened before the first is read: what cannot be had is said at once.
    opened = [open_source(spec, rules) for spec in specs]
    loaded = [source.load(rules) for source in opened]
    notes = [*(note for own in loaded for note in own.notes), *_unmapped(opened, rules)]
    rows = [
        TokenRow(tokens, source) for source, own in enumerate(loaded) for tokens in own.rows
    ]  # fmt: skip
    return Corpus(
        rows,
        tuple(spec.text for spec in specs),
        _digest(row.tokens for row in rows),
        sum(row.tokens.size for row in rows),
        tuple(notes),
        tuple(map(_origin, opened, loaded)),
    )


def _unmapped(sources: Sequence[Source], rules: Rules) -> list[str]:
    """What to say of sources that a field map was not for.

    Raises:
        CalibrationError: it was for none of them, so its names are wrong.
    """
    if not rules.field_map:
        return []
    names = ", ".join(rules.field_map.values())
    if not rules.mapped:
        raise CalibrationError(f"--map names {names}, and no record of the data has such a field")
    texts = [source.spec.text for source in sources if source.has_records]
    return [
        f"{text}: has none of the fields that --map names ({names}), read by its own"
        for text in texts
        if text not in rules.mapped
    ]


def _check_specs(specs: Sequence[CalibrationSpec]) -> None:
    if not specs:
        raise UsageError("no calibration data: give a SPEC such as calib.jsonl:512 or builtin")
    texts = [spec.text for spec in specs]
    repeated = [text for text in texts if texts.count(text) > 1]
    if repeated:
        raise UsageError(f"SPEC {repeated[0]!r} is given twice: leave one out")


def _origin(source: Source, loaded: Loaded) -> Origin:
    spec, hub = source.spec, source.hub
    return Origin(
        source=spec.text,
        kind=spec.kind,
        name=spec.name,
        config=None if hub is None else hub.config,
        split=None if hub is None else hub.split,
        revision=None if hub is None else hub.revision,
        reader=None if hub is None else hub.reader,
        seen=loaded.seen,
        rows=len(loaded.rows),
        tokens=sum(row.size for row in loaded.rows),
        sha256=_digest(loaded.rows),
    )


def _digest(rows: Iterable[Tokens]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.size.to_bytes(8, "little"))
        digest.update(row.astype("<i8").tobytes())
    return digest.hexdigest()
