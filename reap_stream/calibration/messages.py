"""Messages of all spellings in the one form that chat templates take.

    role         system, user, assistant or tool
    content      text; empty where an assistant only calls tools
    tool_calls   of an assistant, see `tools`
    reasoning_content, thinking   of an assistant: what it thought before it answered, apart from
                 the content; templates read one of the two names

Other fields of a message are passed on, for a template that knows them.
"""

from __future__ import annotations

import json
from typing import Any, Final

from reap_stream.calibration.tools import normalise_calls, parse_json
from reap_stream.errors import CalibrationError

_ROLES: Final = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "ai": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
    "tool_response": "tool", "function_response": "tool",
    "function_call": "call", "tool_call": "call",
}  # fmt: skip
_REASONING: Final = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS: Final = ("text", "input_text", "output_text")
_TRANSLATED: Final = (
    "role",
    "from",
    "content",
    "value",
    "tool_calls",
    "function_call",
    *_REASONING,
)
_OPEN: Final = "<think>"
_CLOSE: Final = "</think>"


def normalise_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the messages of a conversation.

    Args:
        value: a list of messages, or JSON of one, with role and content or from and value.
        where: the place, for the message.

    Raises:
        CalibrationError: no list of messages, an unknown role, or content that is no text.
    """
    if isinstance(value, str):
        value = parse_json(value, where)
    value = _transposed(value)
    if not isinstance(value, list):
        raise CalibrationError(f"{where} must be a list, not {type(value).__name__}")
    messages = [_message(message, f"{where}[{number}]") for number, message in enumerate(value)]
    _identify_calls(messages)
    return messages


def _transposed(value: Any) -> Any:
    """A table of columns as rows: so `datasets` gives a list of objects declared as a sequence."""
    if not isinstance(value, dict) or not value:
        return value
    columns = list(value.values())
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def assistant_message(content: str, reasoning: str | None = None) -> dict[str, Any]:
    """An assistant's turn; reasoning in the content itself is told apart."""
    if not reasoning:
        reasoning, content = split_reasoning(content)
    message: dict[str, Any] = {"role": "assistant", "content": content}
    return {**message, **_thought(reasoning)}


def split_reasoning(content: str) -> tuple[str, str]:
    """Divide what a model wrote into its reasoning and its answer.

    The opening mark may be missing, since some templates put it into the prompt.

    Returns:
        The reasoning without its marks, empty if there is none, and the rest.
    """
    head, closed, answer = content.partition(_CLOSE)
    opened = head.lstrip().startswith(_OPEN)
    if not closed or (not opened and _OPEN in head):
        return "", content
    return head.lstrip().removeprefix(_OPEN).strip(), answer.lstrip("\n")


def join_reasoning(reasoning: str, content: str) -> str:
    """Write reasoning into the content, as most models write it."""
    return f"{_OPEN}\n{reasoning}\n{_CLOSE}\n\n{content}"


def _thought(reasoning: str) -> dict[str, str]:
    return {"reasoning_content": reasoning, "thinking": reasoning} if reasoning else {}


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise CalibrationError(f"{where} must be an object, not {type(message).__name__}")
    role = _role(message, where)
    content = message.get("content", message.get("value"))
    calls = message.get("tool_calls") or message.get("function_call")
    if role == "call":
        role, content, calls = "assistant", None, content
    text, thought = _content(content, where, is_result=role == "tool")
    reasoning = _reasoning(message, where) or thought
    # An answer that said nothing is published as null.
    silent = role == "assistant" and "content" in message
    if content is None and not (calls or reasoning or silent):
        raise CalibrationError(
            f"{where} has fields {_found(message)}: it needs role and content, neither of them null"
        )
    result = {
        key: value for key, value in message.items() if key not in _TRANSLATED and value is not None
    }
    result.update(role=role, content=text)
    if role == "assistant":
        result.update(assistant_message(text, reasoning))
    if calls:
        result["tool_calls"] = normalise_calls(calls, f"{where}: tool_calls")
    return result


def _role(message: dict[str, Any], where: str) -> str:
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise CalibrationError(f"{where} has fields {_found(message)}: it needs role and content")
    known = _ROLES.get(role.strip().lower())
    if known is None:
        raise CalibrationError(f"{where}: role {role!r} is none of {', '.join(_ROLES)}")
    return known


def _found(message: dict[str, Any]) -> str:
    return ", ".join(sorted(map(str, message))) or "none"


def _reasoning(message: dict[str, Any], where: str) -> str:
    for name in _REASONING:
        value = message.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise CalibrationError(f"{where}: {name} must be text, not {type(value).__name__}")
            return value.strip()
    return ""


def _content(content: Any, where: str, *, is_result: bool) -> tuple[str, str]:
    """Return text, and the reasoning that parts of it are."""
    if content is None:
        return "", ""
    if isinstance(content, str):
        return content, ""
    if isinstance(content, dict) and is_result:
        return json.dumps(content, ensure_ascii=False), ""
    if not isinstance(content, list):
        raise CalibrationError(f"{where}: content must be text, not {type(content).__name__}")
    texts, thoughts = [], []
    for number, part in enumerate(content):
        text, thought = _part(part, f"{where}: content[{number}]")
        texts.append(text)
        thoughts.append(thought)
    return "".join(texts), "".join(thoughts).strip()


def _part(part: Any, where: str) -> tuple[str, str]:
    if isinstance(part, str):
        return part, ""
    if not isinstance(part, dict):
        raise CalibrationError(f"{where} must be text, not {type(part).__name__}")
    kind = part.get("type", "text")
    name = "text" if kind in _TEXT_PARTS else kind
    text = part.get(name) if name in ("text", "thinking") else None
    if not isinstance(text, str):
        raise CalibrationError(
            f"{where} is of type {kind!r} with fields {_found(part)}: only text can be calibrated on"
        )
    return (text, "") if name == "text" else ("", text)


def _identify_calls(messages: list[dict[str, Any]]) -> None:
    """Give calls that have no id one, in the form that the one family of models prints that does.

    Results without one answer the calls before them in order.
    """
    count = 0
    pending: list[str] = []
    for message in messages:
        calls = message.get("tool_calls", ())
        for call in calls:
            call.setdefault("id", f"functions.{call['function']['name']}:{count}")
            count += 1
        if calls:
            pending = [call["id"] for call in calls]
        if message["role"] == "tool" and pending:
            known = message.get("tool_call_id")
            answered = known if known in pending else pending[0]
            pending.remove(answered)
            message.setdefault("tool_call_id", answered)
