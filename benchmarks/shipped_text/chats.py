"""Conversations of a user and an assistant, made by a seeded generator.

Three kinds: questions about functions of Python's standard library, answered by their docstrings
and signatures (Python's licence); questions about the language, answered by its reference (the
same); and small tasks with their solution, some of them with the assistant's reasoning, which are
our own (see `tasks`).
"""

from __future__ import annotations

import ast
import inspect
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

from shipped_text.documents import python_sources
from shipped_text.tasks import task

Message = dict[str, Any]

_SYSTEM = (
    "You are a helpful assistant.",
    "You answer questions about Python for people who already program in another language.",
    "Answer briefly and to the point. Use Markdown for code.",
    "You are a patient tutor. If something is ambiguous, say so.",
    "You are a coding assistant inside an editor. The user sees your answers in a narrow panel.",
)
_WHAT = (
    "What does `{name}` do?",
    "Can you explain `{name}` to me?",
    "I came across `{name}` in somebody's code. What is it for?",
    "Which problem does `{name}` solve?",
    "Summarise the documentation of `{name}`, please.",
)
_ARGUMENTS = (
    "Which arguments does it take?",
    "What do I pass to it?",
    "And its parameters? Are any of them optional?",
)
_SOURCE = (
    "Could you show me how it is written?",
    "I would like to see its source.",
    "How is that implemented in the standard library?",
)
_TOPIC = (
    "What does Python's reference say about {topic}?",
    "I need the exact rules for {topic} in Python.",
    "Explain {topic} in Python, please. I want the details, not a tutorial.",
)
_MOST_CHARACTERS = 2_200
_TASKS_A_QUESTION = 2


@dataclass(frozen=True)
class _Function:
    name: str
    document: str
    node: ast.FunctionDef
    source: str


def chats(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Conversations without end of the small tasks, without repeating a function or topic."""
    functions, subjects = list(_functions()), sorted(topics)
    rng.shuffle(functions)
    rng.shuffle(subjects)
    while functions:
        yield _record(rng, _about_function(rng, functions.pop()))
        for _ in range(_TASKS_A_QUESTION):
            yield _record(rng, task(rng))
        if subjects:
            yield _record(rng, _about_topic(rng, subjects.pop()))


def _record(rng: random.Random, messages: list[Message]) -> dict[str, Any]:
    if rng.random() < 0.4:
        messages = [{"role": "system", "content": rng.choice(_SYSTEM)}, *messages]
    return {"messages": messages}


def _functions() -> Iterator[_Function]:
    """Public functions of public modules that have a docstring of some length."""
    for path, source in python_sources():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        for node in ast.parse(source).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            document = inspect.cleandoc(ast.get_docstring(node) or "")
            if 100 <= len(document) <= _MOST_CHARACTERS:
                text = ast.get_source_segment(source, node) or ""
                yield _Function(f"{module}.{node.name}", document, node, text)


def _about_function(rng: random.Random, function: _Function) -> list[Message]:
    signature = f"{function.name}({ast.unparse(function.node.args)})"
    answer = f"```python\n{signature}\n```\n\n{function.document}"
    messages = _turn(rng.choice(_WHAT).format(name=function.name), answer)
    if rng.random() < 0.6:
        messages += _turn(rng.choice(_ARGUMENTS), _arguments(function.node.args))
    if rng.random() < 0.5 and len(function.source) <= _MOST_CHARACTERS:
        messages += _turn(rng.choice(_SOURCE), f"```python\n{function.source}\n```")
    return messages


def _arguments(arguments: ast.arguments) -> str:
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    firsts = len(names) - len(arguments.defaults)
    lines = [f"- `{name}`, which you must give" for name in names[:firsts]]
    given = [
        *zip(names[firsts:], arguments.defaults, strict=True),
        *((a.arg, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)),
    ]
    for name, default in given:
        value = "which you must give by name" if default is None else f"`{ast.unparse(default)}`"
        lines.append(f"- `{name}`, {value}{'' if default is None else ' if you leave it out'}")
    if arguments.vararg:
        lines.append(f"- any number of further values, collected in `{arguments.vararg.arg}`")
    if arguments.kwarg:
        lines.append(f"- any keywords, collected in `{arguments.kwarg.arg}`")
    return "It takes:\n\n" + "\n".join(lines) if lines else "None: you call it with nothing."


def _about_topic(rng: random.Random, topic: str) -> list[Message]:
    title, _, text = topics[topic].strip().partition("\n")
    paragraphs = text.lstrip("*=-\n").split("\n\n")
    answer, follow_up = _some(paragraphs)
    messages = _turn(rng.choice(_TOPIC).format(topic=_lowered(title)), answer)
    if follow_up and rng.random() < 0.5:
        messages += _turn(rng.choice(("Go on.", "Is there more to it?")), _some(follow_up)[0])
    return messages


def _some(paragraphs: list[str]) -> tuple[str, list[str]]:
    """The first paragraphs of a bearable length, and the others."""
    taken = 1
    while len("\n\n".join(paragraphs[: taken + 1])) <= _MOST_CHARACTERS and taken < len(paragraphs):
        taken += 1
    return "\n\n".join(paragraphs[:taken])[: 2 * _MOST_CHARACTERS].strip(), paragraphs[taken:]


def _lowered(title: str) -> str:
    return title if title.isupper() else title[0].lower() + title[1:]


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
