"""One call of the model's chat template, in the spelling that this template takes.

Templates agree on what a conversation is and not on how a tool call is spelled: most want its
arguments as an object, some as JSON; some want ids of nine characters, some no text beside
reasoning. They are asked in turn, and the first spelling that is taken without loss counts. The date is always the same, where a template
prints one: rows that change at midnight could be neither reproduced nor resumed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None

_DATE: Final = {
    "%Y": "2025", "%y": "25", "%m": "07", "%B": "July", "%b": "Jul", "%d": "01", "%j": "182",
    "%A": "Tuesday", "%a": "Tue", "%H": "12", "%I": "12", "%p": "PM", "%M": "00", "%S": "00",
}  # fmt: skip
_CLOCK: Final = "strftime_now"


def template_errors() -> tuple[type[Exception], ...]:
    """What a template raises when a conversation is not as it expects it."""
    from jinja2 import TemplateError

    return (TemplateError, ValueError, TypeError, LookupError, AttributeError, ImportError)


class TemplateCall:
    """A tokenizer's ``apply_chat_template``."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, messages: list[Message], tools: Tools, **options: bool) -> str:
        """Render messages.

        Args:
            messages: as `normalise_messages` makes them.
            tools: what the template may list.
            options: variables of the template.

        Raises:
            Exception: one of `template_errors`: the template refuses the messages in every
                spelling, or prints nothing of their tool calls.
        """
        refusal: Exception | None = None
        printed = None
        for spelling in self._spellings(messages):
            try:
                text = self._apply(spelling, tools, options)
            except template_errors() as error:
                refusal = refusal or error
                continue
            _check_calls(text, spelling)
            if not _prints_python(text, spelling):
                return text
            printed = text
        if printed is None and refusal is not None:
            raise refusal
        return printed or ""

    def _apply(self, messages: list[Message], tools: Tools, options: dict[str, bool]) -> str:
        dated = self._dated(tools)
        template = {} if dated is None else {"chat_template": dated}
        text: str = self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, **template, **options
        )
        return text

    def _dated(self, tools: Tools) -> str | None:
        """The template with a clock that stands still; None where it asks for none."""
        find = getattr(self._tokenizer, "get_chat_template", None)
        template = "" if find is None else find(tools=tools)
        if _CLOCK not in template:
            return None
        steps = "".join(f"|replace('{code}', '{value}')" for code, value in _DATE.items())
        return (
            f"{{%- macro {_CLOCK}(format) -%}}{{{{ format{steps} }}}}{{%- endmacro -%}}{template}"
        )

    def _spellings(self, messages: list[Message]) -> Iterator[list[Message]]:
        if not any("tool_calls" in message for message in messages):
            yield messages
            return
        yield messages
        yield _with_text_arguments(messages)
        numbered = _with_short_ids(messages)
        yield numbered
        yield _with_text_arguments(numbered)
        yield _with_all_thought(messages)


def _calls(messages: list[Message]) -> Iterator[dict[str, Any]]:
    for message in messages:
        yield from message.get("tool_calls", ())


def _check_calls(text: str, messages: list[Message]) -> None:
    """Refuse a template that says nothing of tool calls, whose rows would lack them silently."""
    for call in _calls(messages):
        name = call["function"]["name"]
        if name not in text and call["id"] not in text:
            raise ValueError(f"it leaves out tool calls ({name}): the model has no form for them")


def _prints_python(text: str, messages: list[Message]) -> bool:
    """Whether a template without ``tojson`` printed an object as Python does."""
    values = [call["function"]["arguments"] for call in _calls(messages)]
    return any(isinstance(value, dict) and value and str(value) in text for value in values)


def _with_calls(messages: list[Message], changed: dict[int, dict[str, Any]]) -> list[Message]:
    """Messages with calls put in place of those of the same identity."""
    return [
        {**message, "tool_calls": [changed[id(call)] for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _with_text_arguments(messages: list[Message]) -> list[Message]:
    changed = {}
    for call in _calls(messages):
        function = call["function"]
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        changed[id(call)] = {**call, "function": {**function, "arguments": arguments}}
    return _with_calls(messages, changed)


def _with_all_thought(messages: list[Message]) -> list[Message]:
    """What is said before a call becomes part of the reasoning, where both are not to be had."""

    def joined(message: Message) -> Message:
        thought, said = message.get("reasoning_content"), message.get("content")
        if "tool_calls" not in message or not thought or not said:
            return message
        both = f"{thought}\n\n{said}"
        return {**message, "content": "", "reasoning_content": both, "thinking": both}

    return [joined(message) for message in messages]


def _with_short_ids(messages: list[Message]) -> list[Message]:
    short: dict[Any, str] = {}
    changed = {}
    for number, call in enumerate(_calls(messages)):
        short[call["id"]] = f"call{number:05}"
        changed[id(call)] = {**call, "id": short[call["id"]]}
    return [
        {**message, "tool_call_id": short.get(message["tool_call_id"], message["tool_call_id"])}
        if "tool_call_id" in message
        else message
        for message in _with_calls(messages, changed)
    ]
