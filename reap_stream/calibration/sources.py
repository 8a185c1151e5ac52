"""From one calibration SPEC to its rows: opened, read record by record, drawn and cut.

Each SPEC is read once; only rows that could stay are encoded and only rows that stay are held, so
the length of a file costs time and no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Final, cast

import numpy as np

from reap_stream.calibration.arrays import array_rows
from reap_stream.calibration.builtin import builtin_parts, builtin_path
from reap_stream.calibration.conversations import Conversation, interpret
from reap_stream.calibration.encoding import TextEncoder, Tokens
from reap_stream.calibration.hub import HubSet, open_hub_set
from reap_stream.calibration.packing import fill
from reap_stream.calibration.records import read_records, require_pyarrow
from reap_stream.calibration.rules import Rules
from reap_stream.calibration.sampling import MIN_ROW_TOKENS, Candidate, Window, draw, shares
from reap_stream.calibration.schemas import holds_mapped
from reap_stream.calibration.spec import FILE_SUFFIXES, CalibrationSpec
from reap_stream.errors import CalibrationError, UsageError

_TXT_CHUNK_CHARS: Final = 1 << 16
# Enough that a sample is not the head of the set, little enough to be fetched for each run.
_HUB_WINDOW: Final = Window(per_row=4, least=1000)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a SPEC gave.

    Attributes:
        rows: token ids of each row, int64 [tokens].
        seen: rows or documents that these were drawn from.
        notes: what the user should know.
    """

    rows: list[Tokens]
    seen: int
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Source:
    """A SPEC whose data are there; make it with `open_source`.

    Attributes:
        spec: the SPEC.
        hub: the data set, if it is one on the Hub.
    """

    spec: CalibrationSpec
    hub: HubSet | None = None

    @property
    def has_records(self) -> bool:
        """Whether its rows are records with fields."""
        return self.hub is not None or (
            self.spec.kind == "file" and self.spec.path.suffix in (".jsonl", ".parquet")
        )

    def load(self, rules: Rules) -> Loaded:
        """Read, draw and encode its rows.

        Raises:
            CalibrationError: malformed data, or none of use.
        """
        limit = rules.rows.limit(self.spec)
        streams = self._candidates(rules)
        window = None if self.hub is None else _HUB_WINDOW
        drawn = [
            fill(stream, (share, rules.rows.sequence_length), rules.rows.seed, window)
            if rules.rows.pack
            else draw(stream, share, rules.rows.seed, window)
            for stream, share in zip(streams, shares(limit, len(streams)), strict=True)
        ]
        # Parts of a mix take turns.
        turns = chain.from_iterable(zip_longest(*(part.rows for part in drawn)))
        rows = [tokens for tokens in turns if tokens is not None]
        skipped = sum(part.skipped for part in drawn)
        seen, gave_up = sum(part.seen for part in drawn), any(part.gave_up for part in drawn)
        if not rows:
            end = (
                "; no more are read: save those of use to a file, give its path" if gave_up else ""
            )
            raise CalibrationError(
                f"SPEC {self.spec.text!r} holds no row of at least {MIN_ROW_TOKENS}"
                f" tokens ({skipped} shorter ones){end}"
            )
        notes = [f"{self.spec.text}: {note}" for note in self._notes(rows, skipped, rules)]
        if gave_up:
            notes.append(f"{self.spec.text}: so few rows are of use that it was read no further")
        return Loaded(rows, seen, notes)

    def _notes(self, rows: list[Tokens], skipped: int, rules: Rules) -> Iterator[str]:
        if skipped:
            yield f"{skipped} rows of under {MIN_ROW_TOKENS} tokens skipped"
        asked, length = self.spec.rows, rules.rows.sequence_length
        if asked is not None and not rules.rows.pack and len(rows) < asked:
            yield f"{len(rows)} rows, {asked} were asked for"
        tokens = sum(row.size for row in rows)
        if asked is not None and rules.rows.pack and tokens < asked * length:
            yield f"{tokens} tokens, {asked} packs of {length} were asked for"
        if self.spec.kind == "builtin" and rules.encoder and not rules.encoder.has_chat_template:
            parts = builtin_parts(self.spec.name, chat=False)
            if parts != builtin_parts(self.spec.name, chat=True):
                yield f"{' and '.join(parts)} alone: the tokenizer has no chat template"

    def _candidates(self, rules: Rules) -> list[Iterator[Candidate]]:
        """Return the streams of rows, each still to be made, that are mixed in equal shares."""
        spec = self.spec
        if _is_array(spec):
            return [array_rows(spec.path, rules.vocab_size, rules.rows.most_tokens)]
        encoder = cast("TextEncoder", rules.encoder)
        if spec.kind == "builtin":
            parts = builtin_parts(spec.name, chat=encoder.has_chat_template)
            return [_builtin_rows(builtin_path(part), encoder, rules) for part in parts]
        if self.hub is not None:
            return [_record_rows(self.hub.records(rules.rows.seed), encoder, rules, spec)]
        if spec.path.suffix == ".txt":
            pieces = encoder.encode_document(_text_chunks(spec.path), str(spec.path))
            return [_made(cut_rows(pieces, rules.rows.sequence_length))]
        records = read_records(spec.path, rules.field_map)
        return [_record_rows(records, encoder, rules, spec)]


def open_source(spec: CalibrationSpec, rules: Rules) -> Source:
    """Look whether a SPEC's data are there and can be used; nothing is read yet.

    Raises:
        UsageError: a file of another kind, or a Hub data set without a number of rows.
        CalibrationError: no such data, or data that this model cannot use.
    """
    if rules.encoder is None and not _is_array(spec):
        raise CalibrationError(
            f"SPEC {spec.text!r} is text and the model has no tokenizer: give a"
            " .npy file of token ids"
        )
    if spec.kind == "builtin":
        _check_builtin(spec, cast("TextEncoder", rules.encoder))
    if spec.kind == "file":
        _check_file(spec.path)
    if spec.kind == "hub" and rules.rows.limit(spec) is None:
        raise UsageError(f"SPEC {spec.text!r}: a data set is not read whole: give :N rows")
    return Source(spec, open_hub_set(spec) if spec.kind == "hub" else None)


def _is_array(spec: CalibrationSpec) -> bool:
    return spec.kind == "file" and spec.path.suffix == ".npy"


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise CalibrationError(f"{path}: there is no such calibration file")
    if path.suffix not in FILE_SUFFIXES:
        raise UsageError(f"{path}: calibration files end in {', '.join(FILE_SUFFIXES)}")
    if path.suffix == ".parquet":
        require_pyarrow(path)


def _check_builtin(spec: CalibrationSpec, encoder: TextEncoder) -> None:
    if not builtin_parts(spec.name, chat=encoder.has_chat_template):
        raise CalibrationError(
            f"SPEC {spec.text!r}: {spec.name} are conversations and this model's"
            " tokenizer has no chat template: give builtin:code or builtin:prose"
        )


def _builtin_rows(path: Path, encoder: TextEncoder, rules: Rules) -> Iterator[Candidate]:
    for where, record in read_records(path):
        content = interpret(record, where, chat=encoder.has_chat_template)
        if isinstance(content, str) and not rules.rows.pack:
            pieces = encoder.encode_document([content], where)
            yield from _made(cut_rows(pieces, rules.rows.sequence_length))
        else:
            yield from _content_rows(content, where, encoder, rules)


def _record_rows(
    records: Iterable[tuple[str, dict[str, object]]],
    encoder: TextEncoder,
    rules: Rules,
    spec: CalibrationSpec,
) -> Iterator[Candidate]:
    chat = encoder.has_chat_template
    for where, record in records:
        if holds_mapped(record, rules.field_map):
            rules.mapped.add(spec.text)
        content = interpret(record, where, chat=chat, field_map=rules.field_map)
        yield from _content_rows(content, where, encoder, rules)


def _content_rows(
    content: str | Conversation, where: str, encoder: TextEncoder, rules: Rules
) -> Iterator[Candidate]:
    for row in encoder.rows(content, where):
        yield partial(encoder.encode, row, where, rules.rows.most_tokens)


def _made(rows: Iterable[Tokens]) -> Iterator[Candidate]:
    # A copy when drawn: a view would hold on to the whole piece it was cut from.
    return (partial(np.copy, row) for row in rows)


def cut_rows(pieces: Iterable[Tokens], length: int) -> Iterator[Tokens]:
    """Cut a document, given in pieces, into consecutive rows of `length` tokens, the last shorter."""
    rest = np.empty(0, np.int64)
    for piece in pieces:
        rest = np.concatenate([rest, piece])
        whole = rest.size // length * length
        yield from (rest[start : start + length] for start in range(0, whole, length))
        rest = rest[whole:]
    if rest.size:
        yield rest


def _text_chunks(path: Path) -> Iterator[str]:
    try:
        # No newline translation: the document is encoded as it is.
        with path.open(encoding="utf-8-sig", newline="") as file:
            while chunk := file.read(_TXT_CHUNK_CHARS):
                yield chunk
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text: {error}") from error
