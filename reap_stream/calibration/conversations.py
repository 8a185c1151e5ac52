"""What a record says: a document, or a conversation for the model's chat template.

The form of a record, or the user's field map, names which field holds what; here the fields are
put together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from reap_stream.calibration.messages import assistant_message, normalise_messages
from reap_stream.calibration.schemas import (
    RecordForm,
    holds_mapped,
    is_optional,
    known_forms,
    look_up,
    match_form,
)
from reap_stream.calibration.tools import normalise_calls, normalise_tools
from reap_stream.errors import CalibrationError

_SAYS: Final = frozenset({"content", "tool_calls", "reasoning_content"})
_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Held = dict[str, tuple[str, Any]]
"""For each target that a record has, the field's name and its value, never null."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for a chat template, and the tools that the template may list."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def interpret(
    record: dict[str, Any],
    where: str,
    *,
    chat: bool,
    field_map: Mapping[str, str] | None = None,
) -> str | Conversation:
    """Return what a record says.

    Args:
        record: its fields; null is as good as absent.
        where: file and line, for the message.
        chat: whether the tokenizer has a chat template. With one, a prompt and its completion are
            a conversation, without one they are joined by a newline.
        field_map: target to field, as `parse_field_map` reads it. A record that has none of these
            fields is read by its own form, so that one map can serve a mix.

    Returns:
        A document, or a conversation; empty text where all fields are null.

    Raises:
        CalibrationError: unknown fields, a field of the wrong kind, or messages without a chat
            template.
    """
    if field_map and holds_mapped(record, field_map):
        held = _mapped(record, where, field_map)
    else:
        held = _held(record, _form(record, where, chat=chat, mapped=field_map))
    if not held:
        return ""
    if "text" in held:
        return _text(held, "text", where)
    return _conversation(held, where) if chat else _joined(held, where)


def _mapped(record: dict[str, Any], where: str, field_map: Mapping[str, str]) -> Held:
    held: Held = {}
    for target, name in field_map.items():
        is_there, value = look_up(record, name)
        if not is_there and not is_optional(target):
            raise CalibrationError(
                f"{where}: has no {name}, which --map names for {target}; it has fields"
                f" {_fields(record)}"
            )
        if value is not None:
            held[target] = (name, value)
    return held


def _form(
    record: dict[str, Any], where: str, *, chat: bool, mapped: Mapping[str, str] | None
) -> RecordForm:
    form = match_form(record, chat=chat)
    if form is None:
        raise CalibrationError(unknown_fields(record, where, mapped))
    return form


def unknown_fields(
    fields: Mapping[str, Any] | list[str], where: str, mapped: Mapping[str, str] | None
) -> str:
    """What to say of a record whose fields are no known form."""
    lacking = f", nor are there {', '.join(mapped.values())} that --map names" if mapped else ""
    return (
        f"{where}: fields {_fields(fields)} are no known record{lacking}: name them with --map"
        f" user=FIELD,assistant=FIELD or --map text=FIELD; without it needs {known_forms()}"
    )


def _fields(fields: Mapping[str, Any] | list[str]) -> str:
    return ", ".join(sorted(map(str, fields))) or "none"


def _held(record: dict[str, Any], form: RecordForm) -> Held:
    held: Held = {}
    for target, names in (*form.required.items(), *form.optional.items()):
        name = next((name for name in names if record.get(name) is not None), None)
        if name is not None:
            held[target] = (name, record[name])
    return held


def _text(held: Held, target: str, where: str) -> str:
    if target not in held:
        return ""
    name, value = held[target]
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: {name} must be text, not {type(value).__name__}")
    return value


def _conversation(held: Held, where: str) -> Conversation:
    messages: list[dict[str, Any]] = []
    if "messages" in held:
        name, value = held["messages"]
        messages = normalise_messages(value, f"{where}: {name}")
    messages += _user(held, where)
    messages = _answered(messages, held, where)
    system = _text(held, "system", where)
    if system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    tools = None
    if "tools" in held:
        name, value = held["tools"]
        tools = normalise_tools(value, f"{where}: {name}")
    # A prompt and an answer of nothing are nothing, which a template would still put marks around.
    if not any(_SAYS.intersection(key for key in message if message[key]) for message in messages):
        messages = []
    return Conversation(messages, tools)


def _user(held: Held, where: str) -> list[dict[str, Any]]:
    if "user" not in held:
        return []
    name, value = held["user"]
    if isinstance(value, list):
        return normalise_messages(value, f"{where}: {name}")
    return [{"role": "user", "content": _question(held, where)}]


def _question(held: Held, where: str) -> str:
    """The user's text with what belongs to it."""
    question = _text(held, "user", where)
    if "choices" in held:
        question = f"{question}\n{_choices(held, where)}"
        subject = _text(held, "subject", where).replace("_", " ")
        topic = f"A multiple choice question about {subject}." if subject else ""
        return "\n\n".join(filter(None, (topic, question)))
    return "\n\n".join(filter(None, (question, _text(held, "context", where))))


def _choices(held: Held, where: str) -> str:
    name, value = held["choices"]
    options = value.get("text") if isinstance(value, dict) else value
    if not isinstance(options, list) or len(options) > len(_LETTERS):
        raise CalibrationError(f"{where}: {name} must be a list of up to {len(_LETTERS)} answers")
    return "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, options, strict=False))


def _answered(messages: list[dict[str, Any]], held: Held, where: str) -> list[dict[str, Any]]:
    """Append the assistant's turn."""
    if "calls" in held:
        name, value = held["calls"]
        calls = normalise_calls(value, f"{where}: {name}")
        wanted = [{"role": "assistant", "content": "", "tool_calls": calls}]
        return [*messages, *normalise_messages(wanted, f"{where}: {name}")]
    name, value = held.get("assistant", ("", None))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        answer = normalise_messages(value, f"{where}: {name}")
        # Preference sets repeat the prompt before each answer.
        return answer if answer[0]["role"] in ("system", "user") else [*messages, *answer]
    reasoning = _text(held, "reasoning", where)
    if value is None and not reasoning:
        return messages
    return [*messages, assistant_message(_answer(held, where), reasoning)]


def _answer(held: Held, where: str) -> str:
    name, value = held.get("assistant", ("", ""))
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        value = next(iter(value), "")
    return _text({"assistant": (name, value)}, "assistant", where)


def _joined(held: Held, where: str) -> str:
    """A prompt and its answer as plain text."""
    parts = ("messages", "tools", "calls")
    listed = [held[target] for target in ("user", "assistant") if target in held]
    if any(target in held for target in parts) or any(
        isinstance(value, list) and value and isinstance(value[0], dict) for _, value in listed
    ):
        raise CalibrationError(
            f"{where}: messages need a chat template and this model's tokenizer has none: name a"
            " field of plain text with --map text=FIELD, or give other data"
        )
    question = _question(held, where) if "user" in held else ""
    reasoning = _text(held, "reasoning", where)
    texts = (_text(held, "system", where), question, reasoning, _answer(held, where))
    return "\n".join(filter(None, texts))
