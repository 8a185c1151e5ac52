"""Records of data files: which fields a record may have, and what text or conversation they mean.

    text                               a document
    messages (and tools)               a conversation for the model's chat template
    prompt, completion                 one turn of a conversation
    instruction (and input), output    one turn of a conversation

Other fields beside these are ignored. Files are read record by record.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from reap_stream.errors import CalibrationError

SCHEMAS: Final[tuple[tuple[str, ...], ...]] = (
    ("text",),
    ("messages",),
    ("prompt", "completion"),
    ("instruction", "output"),
)
"""The fields that make a record; where a record has several, the first that is not null counts."""

_OPTIONAL: Final = ("tools", "input")
_PARQUET_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for a chat template, and the tools that the template may list."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each record of a ``.jsonl`` or ``.parquet`` file with the place it stands at.

    Raises:
        CalibrationError: unreadable, or a line that is no JSON object; the place is named.
    """
    reader = _read_parquet if path.suffix == ".parquet" else _read_jsonl
    try:
        yield from reader(path)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error}") from error


def require_pyarrow(path: Path) -> None:
    """Refuse a Parquet file where nothing can read it.

    Raises:
        CalibrationError: pyarrow is not installed.
    """
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise CalibrationError(
            f'{path}: reading Parquet needs pyarrow: pip install "reap-stream[data]"'
        ) from error


def interpret(record: dict[str, Any], where: str, *, chat: bool) -> str | Conversation:
    """Return what a record says.

    Args:
        record: its fields; null is as good as absent.
        where: file and line, for the message.
        chat: whether the tokenizer has a chat template. With one, a prompt and its completion are
            a conversation of two messages, without one they are joined by a newline.

    Returns:
        A document, or a conversation; empty text where all fields are null.

    Raises:
        CalibrationError: unknown fields, a field of the wrong kind, or messages without a chat
            template.
    """
    present = _schemas(record, where)
    schema = next((s for s in present if any(record[name] is not None for name in s)), None)
    if schema is None:
        return ""
    if schema == ("messages",):
        return _conversation(record, where, chat=chat)
    texts = [_text(record, name, where) for name in schema]
    if len(texts) == 1:
        return texts[0]
    prompt, answer = texts
    if schema[0] == "instruction" and record.get("input") is not None:
        prompt = "\n\n".join(filter(None, (prompt, _text(record, "input", where))))
    if not chat or not prompt + answer:
        return "\n".join(filter(None, (prompt, answer)))
    return Conversation(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    )


def _schemas(fields: Collection[str], where: str) -> list[tuple[str, ...]]:
    present = [schema for schema in SCHEMAS if all(name in fields for name in schema)]
    if not present:
        known = ", or ".join(" and ".join(schema) for schema in SCHEMAS)
        found = ", ".join(sorted(map(str, fields))) or "none"
        raise CalibrationError(f"{where}: fields {found} are no known record: it needs {known}")
    return present


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = record[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: {name} must be text, not {type(value).__name__}")
    return value


def _conversation(record: dict[str, Any], where: str, *, chat: bool) -> Conversation:
    if not chat:
        raise CalibrationError(
            f"{where}: messages need a chat template and this model's tokenizer has none: give"
            " records with text"
        )
    messages = record["messages"]
    if not isinstance(messages, list):
        raise CalibrationError(f"{where}: messages must be a list, not {type(messages).__name__}")
    for number, message in enumerate(messages):
        _check_message(message, f"{where}: messages[{number}]")
    tools = record.get("tools")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise CalibrationError(f"{where}: tools must be a list of objects; text is not parsed")
    return Conversation(messages, tools or None)


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise CalibrationError(f"{where} must be an object, not {type(message).__name__}")
    content = message.get("content")
    complete = content is not None or message.get("tool_calls") is not None
    if not isinstance(message.get("role"), str) or not complete:
        found = ", ".join(sorted(map(str, message))) or "none"
        raise CalibrationError(f"{where} has fields {found}: it needs role and content")
    # Templates for text drop or print lists as they please, so what they yield is not the text.
    if content is not None and not isinstance(content, str):
        raise CalibrationError(f"{where}: content must be text, not {type(content).__name__}")


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{where}: is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise CalibrationError(
                    f"{where}: must be an object with fields, not {type(record).__name__}"
                )
            yield where, record


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = {name for schema in _schemas(names, str(path)) for name in schema}
            columns = [name for name in names if name in wanted.union(_OPTIONAL)]
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", _without_nulls(record, keep=set(columns))
    except pa.ArrowException as error:
        raise CalibrationError(f"{path}: cannot be read as Parquet: {error}") from error


def _without_nulls(value: Any, keep: Collection[str] = ()) -> Any:
    """Drop what Parquet fills in: every struct of a column has all fields that any of them has.

    A chat template would print such a null, where the field was never there.
    """
    if isinstance(value, dict):
        return {
            key: _without_nulls(item)
            for key, item in value.items()
            if item is not None or key in keep
        }
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
