"""From calibration SPECs to rows of token ids: read, drawn, cut and counted.

Each SPEC is read once, record by record; only rows that could stay are encoded and only rows that
stay are held, so the length of a file costs time and no memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from tokenize import TokenError
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from reap_stream.calibration.builtin import builtin_parts
from reap_stream.calibration.encoding import TextEncoder, Tokens
from reap_stream.calibration.records import Conversation, interpret, read_records, require_pyarrow
from reap_stream.calibration.sampling import MIN_ROW_TOKENS, Candidate, draw
from reap_stream.calibration.spec import FILE_SUFFIXES, CalibrationSpec
from reap_stream.errors import CalibrationError, UnsupportedError, UsageError

_TXT_CHUNK_CHARS: Final = 1 << 16

# What numpy raises at a damaged header, which it reads as a Python literal.
_ARRAY_ERRORS: Final = (
    *(OSError, ValueError, TypeError, OverflowError, EOFError),
    *(SyntaxError, TokenError, RecursionError, MemoryError),
)


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One calibration row.

    Attributes:
        tokens: int64 [tokens].
        source: number of its SPEC, an index into `Corpus.sources`.
    """

    tokens: Tokens
    source: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """All calibration rows.

    Attributes:
        rows: in the order of the SPECs and, within one, of its file.
        sources: the SPECs' texts, which label the scores.
        sha256: of all token ids and row boundaries, in hexadecimal.
        num_tokens: tokens of all rows.
        notes: what the user should know: rows skipped, or fewer than were asked for.
    """

    rows: list[TokenRow]
    sources: tuple[str, ...]
    sha256: str
    num_tokens: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Rules:
    """How rows are made and drawn, the same for all SPECs."""

    encoder: TextEncoder | None
    samples: int | None
    sequence_length: int
    seed: int
    vocab_size: int


def load_corpus(
    specs: Sequence[CalibrationSpec],
    tokenizer: Callable[..., Any] | None,
    *,
    samples: int | None,
    sequence_length: int,
    seed: int,
    vocab_size: int,
) -> Corpus:
    """Read, draw and encode the rows that the SPECs name.

    Args:
        specs: at least one, no text twice.
        tokenizer: a transformers tokenizer; None if the model has none, which ``.npy`` allows.
        samples: the most rows of a SPEC that has no ``:N``; None for all.
        sequence_length: the most tokens of a row. Records are cut there; a ``.txt`` file and
            built-in documents go on in the next row.
        seed: of the draw where a SPEC has more rows than asked for, 0 or more.
        vocab_size: ids the model knows; every id must be below.

    Returns:
        The rows, the same for the same arguments and data.

    Raises:
        UsageError: numbers out of range, no SPEC, a SPEC twice, or a file of another kind.
        UnsupportedError: a Hub data set, which this version does not read.
        CalibrationError: data that is missing, malformed, empty or does not fit the model.
    """
    _check_numbers(samples, sequence_length, seed)
    _check_specs(specs, has_tokenizer=tokenizer is not None)
    encoder = None if tokenizer is None else TextEncoder(tokenizer, vocab_size)
    rules = _Rules(encoder, samples, sequence_length, seed, vocab_size)
    rows: list[TokenRow] = []
    notes: list[str] = []
    for source, spec in enumerate(specs):
        rows.extend(TokenRow(tokens, source) for tokens in _load_spec(spec, rules, notes))
    return Corpus(
        rows,
        tuple(spec.text for spec in specs),
        _digest(rows),
        sum(row.tokens.size for row in rows),
        tuple(notes),
    )


def _check_numbers(samples: int | None, sequence_length: int, seed: int) -> None:
    if sequence_length < MIN_ROW_TOKENS:
        raise UsageError(
            f"sequence length {sequence_length} is too short: at least {MIN_ROW_TOKENS} tokens"
        )
    if samples is not None and samples < 1:
        raise UsageError(f"cannot take {samples} samples: at least 1")
    if seed < 0:
        raise UsageError(f"seed {seed} is negative: give 0 or more")


def _check_specs(specs: Sequence[CalibrationSpec], *, has_tokenizer: bool) -> None:
    if not specs:
        raise UsageError("no calibration data: give a SPEC such as calib.jsonl:512 or builtin")
    texts = [spec.text for spec in specs]
    repeated = [text for text in texts if texts.count(text) > 1]
    if repeated:
        raise UsageError(f"calibration SPEC {repeated[0]!r} is given twice: leave one out")
    for spec in specs:
        if spec.kind == "hub":
            raise UnsupportedError(
                f"calibration SPEC {spec.text!r}: there is no such file, and Hub data sets are not"
                f" read by this version: save {spec.name} to a .jsonl file and give its path"
            )
        if spec.kind == "file":
            _check_file(spec.path)
        if not has_tokenizer and not (spec.kind == "file" and spec.path.suffix == ".npy"):
            raise CalibrationError(
                f"calibration SPEC {spec.text!r} is text and the model has no tokenizer: give a"
                " .npy file of token ids"
            )


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise CalibrationError(f"{path}: there is no such calibration file")
    if path.suffix not in FILE_SUFFIXES:
        raise UsageError(f"{path}: calibration files end in {', '.join(FILE_SUFFIXES)}")
    if path.suffix == ".parquet":
        require_pyarrow(path)


def _load_spec(spec: CalibrationSpec, rules: _Rules, notes: list[str]) -> list[Tokens]:
    limit = rules.samples if spec.rows is None else spec.rows
    streams = _candidates(spec, rules)
    shares = _shares(limit, len(streams))
    drawn = [draw(stream, share, rules.seed) for stream, share in zip(streams, shares, strict=True)]
    turns = chain.from_iterable(zip_longest(*(rows for rows, _ in drawn)))
    rows = [tokens for tokens in turns if tokens is not None]
    skipped = sum(count for _, count in drawn)
    if not rows:
        raise CalibrationError(
            f"calibration SPEC {spec.text!r} holds no row of at least {MIN_ROW_TOKENS} tokens"
            f" ({skipped} shorter ones)"
        )
    if skipped:
        notes.append(f"{spec.text}: {skipped} rows of under {MIN_ROW_TOKENS} tokens skipped")
    if spec.rows is not None and len(rows) < spec.rows:
        notes.append(f"{spec.text}: {len(rows)} rows, {spec.rows} were asked for")
    return rows


def _shares(limit: int | None, parts: int) -> list[int | None]:
    """Divide a limit; the first parts get what does not divide."""
    if limit is None:
        return [None] * parts
    return [(limit + parts - 1 - part) // parts for part in range(parts)]


def _candidates(spec: CalibrationSpec, rules: _Rules) -> list[Iterator[Candidate]]:
    """Return the streams of rows, each still to be made, that a SPEC mixes in equal shares."""
    if spec.kind == "file" and spec.path.suffix == ".npy":
        return [_array_rows(spec.path, rules)]
    encoder = cast("TextEncoder", rules.encoder)
    length = rules.sequence_length
    if spec.kind == "builtin":
        return [
            _made(
                row
                for document in part
                for row in cut_rows(encoder.encode_document([document], spec.text), length)
            )
            for part in builtin_parts(spec.name)
        ]
    if spec.path.suffix == ".txt":
        pieces = encoder.encode_document(_text_chunks(spec.path), str(spec.path))
        return [_made(cut_rows(pieces, length))]
    return [_record_rows(spec.path, encoder, length)]


def _made(rows: Iterable[Tokens]) -> Iterator[Candidate]:
    # A copy when drawn: a view would hold on to the whole piece it was cut from.
    return (partial(np.copy, row) for row in rows)


def _record_rows(path: Path, encoder: TextEncoder, length: int) -> Iterator[Candidate]:
    for where, record in read_records(path):
        content = interpret(record, where, chat=encoder.has_chat_template)
        yield partial(_encoded, encoder, content, where, length)


def _encoded(encoder: TextEncoder, content: str | Conversation, where: str, length: int) -> Tokens:
    return encoder.encode(content, where)[:length].copy()


def _text_chunks(path: Path) -> Iterator[str]:
    try:
        # No newline translation: the document is encoded as it is.
        with path.open(encoding="utf-8-sig", newline="") as file:
            while chunk := file.read(_TXT_CHUNK_CHARS):
                yield chunk
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text: {error}") from error


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


def _array_rows(path: Path, rules: _Rules) -> Iterator[Candidate]:
    array = _open_array(path)
    for number in range(array.shape[0]):
        row = array[number].astype(np.int64)
        bad = np.flatnonzero((row < 0) | (row >= rules.vocab_size))
        if bad.size:
            raise CalibrationError(
                f"{path}: token id {row[bad[0]]} at row {number}, column {bad[0]} is outside the"
                f" model's vocabulary of {rules.vocab_size}: the ids are another tokenizer's"
            )
        yield partial(np.copy, row[: rules.sequence_length])


def _open_array(path: Path) -> NDArray[Any]:
    try:
        # Mapped, so that a file much larger than the sample is never held; pickles are refused.
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except _ARRAY_ERRORS as error:
        raise CalibrationError(f"{path}: cannot be read as an array: {error}") from error
    if array.ndim != 2 or array.dtype not in (np.int64, np.int32):
        raise CalibrationError(
            f"{path}: {array.dtype} {list(array.shape)}: it must be int64 or int32 [rows, tokens]"
        )
    return array


def _digest(rows: Iterable[TokenRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.tokens.size.to_bytes(8, "little"))
        digest.update(row.tokens.astype("<i8").tobytes())
    return digest.hexdigest()
