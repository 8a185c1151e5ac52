"""Conversations as text, by the model's chat template, with nothing of the assistant's lost.

Most templates of reasoning models print what the assistant thought in its last turn only, some not
even there, because in use a turn is answered with the reasoning of earlier turns taken away. The
tokens of reasoning are nevertheless what such a model writes most, so every turn that has some is
rendered as it was when the model wrote it: as the end of a conversation of its own, ``messages[:k]``,
with the earlier ones as the template leaves them. What the model sees in use is exactly this. Turns
that the template keeps together, as it does between tool calls, stay together.

A template is asked, never read: what it dropped is seen by what its text lacks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final

from reap_stream.calibration.conversations import Conversation
from reap_stream.calibration.messages import join_reasoning
from reap_stream.calibration.template import Message, TemplateCall, Tools, template_errors
from reap_stream.errors import CalibrationError

_REASONING: Final = ("reasoning_content", "thinking")
# The names under which templates have a switch between answering at once and thinking first.
_THINKING: Final = {"enable_thinking": True, "thinking": True}
_CLOSE: Final = "</think>"
_OPENED: Final = re.compile(r"<think>(\s*)$")
_EMPTY_BLOCK: Final = re.compile(r"<think>(\s*)</think>(\s*)$")
# Letters that no template strips or escapes.
_MARK: Final = "qxjzkvwqxjz"


@dataclass(frozen=True, slots=True)
class Rendering:
    """One row's text.

    Attributes:
        text: as the template made it.
        shared: characters at the beginning that a longer row of the same conversation has too.
    """

    text: str
    shared: int = 0


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._call = TemplateCall(tokenizer)

    def render(self, conversation: Conversation, where: str) -> str:
        """Render a conversation whole, with the reasoning of its last turn.

        Raises:
            CalibrationError: the template refuses it.
        """
        messages = self._prepared(conversation.messages)
        return self._whole(messages, conversation.tools, where)

    def render_rows(self, conversation: Conversation, where: str) -> list[Rendering]:
        """Render a conversation as rows in which all its reasoning stands.

        Returns:
            The whole conversation last; before it, as far as needed, its beginnings, each up to a
            turn whose reasoning the longer ones lack. Reasoning for which the template has no
            place in any turn is left out.

        Raises:
            CalibrationError: the template refuses it.
        """
        messages = self._prepared(conversation.messages)
        missing = reasoning_turns(messages)
        texts: list[str] = []
        end = len(messages)
        while end:
            text = self._whole(messages[:end], conversation.tools, where)
            lacking = _lacking(text, messages, missing)
            if not texts or lacking != missing:
                texts.append(text)
            # A turn that is not kept even at the end of its own row has no place in the template.
            missing = [turn for turn in lacking if turn != end - 1]
            end = missing[-1] + 1 if missing else 0
        shared = [0, *(_common(longer, text) for longer, text in pairwise(texts))]
        rows = [Rendering(text, common) for text, common in zip(texts, shared, strict=True)]
        return rows[::-1]

    def _prepared(self, messages: Sequence[Message]) -> list[Message]:
        """Write reasoning where this template looks for it."""
        if not reasoning_turns(messages) or not self._ignores_reasoning:
            return list(messages)
        return [_folded(message) if _thought(message) else message for message in messages]

    @cached_property
    def _ignores_reasoning(self) -> bool:
        """Whether the template has no place for reasoning but the content itself."""
        asked: Message = {"role": "user", "content": "?"}
        answer: Message = {"role": "assistant", "content": "!", **dict.fromkeys(_REASONING, _MARK)}
        try:
            text = self._whole([asked, answer], None, "")
            folded = self._whole([asked, _folded(answer)], None, "")
        except CalibrationError:
            return False
        return _MARK not in text and _MARK in folded

    def _whole(self, messages: list[Message], tools: Tools, where: str) -> str:
        options = _THINKING if reasoning_turns(messages) else {}
        try:
            text = self._call(messages, tools, **options)
            reasoning = _thought(messages[-1])
            if reasoning and reasoning not in text:
                text = self._completed(messages, tools) or text
        except template_errors() as error:
            raise CalibrationError(
                f"{where}: the model's chat template refuses this conversation: {error}"
            ) from error
        return text

    def _completed(self, messages: list[Message], tools: Tools) -> str | None:
        """Render a last turn as generated: after the prompt that the template makes for it.

        None where the template says neither in its prompt nor by an empty block how it thinks.
        """
        *history, last = messages
        bare = {key: value for key, value in last.items() if key not in _REASONING}
        marked = self._call([*history, {**bare, "content": _MARK}], tools, **_THINKING)
        header, found, _ = marked.rpartition(_MARK)
        turn = self._call([*history, bare], tools, **_THINKING)
        if not found or not turn.startswith(header):
            return None
        answer = turn[len(header) :]
        prompt = self._call(history, tools, add_generation_prompt=True, **_THINKING)
        reasoning = _thought(last)
        opened = _OPENED.search(prompt)
        # What the header has and the prompt has not may be a mark that says "answer at once", and
        # not tool calls that stand before the content.
        if opened and _CLOSE.endswith(header[_common(header, prompt) :].strip()):
            space = opened[1]
            return f"{prompt}{reasoning}{space}{_CLOSE}{space * 2}{answer}"
        if block := _EMPTY_BLOCK.search(header):
            space = block[1][: (len(block[1]) + 1) // 2]
            before = header[: block.start()]
            return f"{before}<think>{space}{reasoning}{space}{_CLOSE}{block[2]}{answer}"
        return None


def reasoning_turns(messages: Sequence[Message]) -> list[int]:
    """Numbers of the messages that have reasoning, ascending."""
    return [number for number, message in enumerate(messages) if _thought(message)]


def _thought(message: Message) -> str:
    reasoning: str = message.get("reasoning_content", "")
    return reasoning


def _folded(message: Message) -> Message:
    bare = {key: value for key, value in message.items() if key not in _REASONING}
    return {**bare, "content": join_reasoning(_thought(message), message["content"])}


def _lacking(text: str, messages: list[Message], turns: list[int]) -> list[int]:
    """Those turns whose reasoning does not stand in a text, where it must be in their order."""
    lacking = []
    end = len(text)
    # From the back, since it is the last turns that templates keep.
    for turn in reversed(turns):
        found = text.rfind(_thought(messages[turn]), 0, end)
        if found < 0:
            lacking.append(turn)
        else:
            end = found
    return lacking[::-1]


def _common(text: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[:middle] == other[:middle] else (low, middle - 1)
    return low
