"""Record forms: which fields a record may have, and what each of them means.

A form names what a record is made of, its targets, and for each target the fields that may hold
it. Sets are known by these fields and by nothing else, so a set that nobody has heard of works if
it names its fields as others do. A field map (``--map user=question,assistant=answer``) is a form
that the user writes.

    text                  a document
    messages              a conversation, or a list of turns to go on with
    tools                 what the template may list
    system                what the conversation opens with
    user                  text, or a list of messages
    context               text that belongs to the user's, below it
    choices, subject      of a question that has no answer here
    assistant             text, a list of messages, or several texts of which the first counts
    calls                 the assistant's tool calls
    reasoning             what the assistant thought before it answered
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from reap_stream.errors import UsageError

Names = tuple[str, ...]

MAP_TARGETS: Final = ("text", "messages", "tools", "system", "user", "assistant", "reasoning")
"""What a field map may name."""

_MAP_OPTIONAL: Final = ("tools", "system", "reasoning")
_MAP_SPEAKERS: Final = ("messages", "user", "assistant")


@dataclass(frozen=True, slots=True)
class RecordForm:
    """One form, as data: for each target the fields that may hold it, the best first."""

    required: Mapping[str, Names]
    optional: Mapping[str, Names] = field(default_factory=dict)


_SYSTEM: Final[Names] = ("system", "system_prompt")
_TURN: Final[Mapping[str, Names]] = {"system": _SYSTEM, "reasoning": ("reasoning_content",)}
_TEXT: Final = RecordForm({"text": ("text", "content", "raw_content", "code", "document")})

FORMS: Final[tuple[RecordForm, ...]] = (
    RecordForm(
        {"messages": ("messages", "conversations", "conversation")},
        {"tools": ("tools", "functions"), "system": _SYSTEM},
    ),
    RecordForm({"user": ("query",), "tools": ("tools",), "calls": ("answers",)}),
    RecordForm(
        {"user": ("instruction",), "assistant": ("output", "response", "completion", "answer")},
        {"context": ("input", "context"), **_TURN},
    ),
    RecordForm(
        {
            "user": ("prompt",),
            "assistant": ("completion", "response", "output", "answer", "chosen", "body"),
        },
        {"tools": ("tools",), **_TURN},
    ),
    RecordForm(
        {"user": ("query",), "assistant": ("answer", "response", "output", "answers")}, _TURN
    ),
    RecordForm(
        {"user": ("question",), "choices": ("choices", "options")}, {"subject": ("subject",)}
    ),
    RecordForm(
        {"user": ("question",), "assistant": ("solution", "response", "answer", "output")}, _TURN
    ),
    RecordForm(
        {
            "user": ("problem",),
            "assistant": ("solution", "generated_solution", "response", "answer"),
        },
        _TURN,
    ),
    RecordForm({"user": ("input",), "assistant": ("output", "response")}, _TURN),
    RecordForm({"user": ("inputs",), "assistant": ("targets",)}),
    RecordForm({"messages": ("chosen",)}, {"system": _SYSTEM}),
    _TEXT,
    RecordForm({"text": ("solution",)}),
)
"""All forms; where a record has several, the first counts.

Fields that say who speaks come before plain text, since with the model's own template they become
what the model sees in use. For a tokenizer without one it is the other way round.
"""

KNOWN_FIELDS: Final = frozenset(
    name
    for form in FORMS
    for targets in (form.required, form.optional)
    for names in targets.values()
    for name in names
)


def match_form(fields: Mapping[str, Any], *, chat: bool) -> RecordForm | None:
    """Return the form of a record.

    A form whose fields all hold something is preferred to one with a null among them.

    Args:
        fields: the record; null is as good as absent, unless every form has one.
        chat: whether the tokenizer has a chat template.
    """
    fitting = [form for form in FORMS if _fits(form, fields)]
    if not chat:
        fitting.sort(key=lambda form: form is not _TEXT)
    filled = {name for name, value in fields.items() if value is not None}
    complete = (form for form in fitting if _fits(form, filled))
    return next(complete, next(iter(fitting), None))


def is_known(fields: Collection[str]) -> bool:
    """Whether records with these fields have a form."""
    return any(_fits(form, fields) for form in FORMS)


def _fits(form: RecordForm, fields: Collection[str]) -> bool:
    return all(any(name in fields for name in names) for names in form.required.values())


def known_forms() -> str:
    """All forms in words, by the best name of each field."""
    return ", or ".join(
        " and ".join(names[0] for names in form.required.values()) for form in FORMS
    )


def parse_field_map(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Read ``--map`` options.

    Args:
        texts: each ``TARGET=FIELD[,TARGET=FIELD…]``.

    Returns:
        Pairs of target and field, in the order given.

    Raises:
        UsageError: not of this form, or what `check_field_map` refuses.
    """
    pairs = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        target, equals, name = (word.strip() for word in part.partition("="))
        if not (target and equals and name):
            raise UsageError(f"--map {part!r} is no TARGET=FIELD, such as user=question")
        pairs.append((target, name))
    check_field_map(pairs)
    return tuple(pairs)


def check_field_map(pairs: Collection[tuple[str, str]]) -> None:
    """Refuse a map that says nothing, or two things at once.

    Raises:
        UsageError: an unknown target, one twice, ``text`` beside others, or no speaker.
    """
    targets = [target for target, _ in pairs]
    for target in targets:
        if target not in MAP_TARGETS:
            raise UsageError(f"--map: there is no target {target!r}: {', '.join(MAP_TARGETS)}")
        if targets.count(target) > 1:
            raise UsageError(f"--map names {target} twice")
    if "text" in targets and len(targets) > 1:
        raise UsageError("--map text=FIELD is a whole document: name nothing beside it")
    if targets and not {"text", *_MAP_SPEAKERS}.intersection(targets):
        raise UsageError("--map needs text, messages, user or assistant")


def is_optional(target: str) -> bool:
    """Whether a record may lack the field that a map names for a target."""
    return target in _MAP_OPTIONAL


def look_up(record: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    """Whether a record has a field, and its value.

    Args:
        record: its fields.
        name: of a field, or a dotted path into nested objects and lists: ``turns.0.question``.
    """
    if name in record:
        return True, record[name]
    value: Any = record
    for step in name.split("."):
        if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, Mapping) and step in value:
            value = value[step]
        else:
            return False, None
    return True, value


def mapped_columns(field_map: Mapping[str, str]) -> set[str]:
    """The fields of a record that a map looks into, or may mean."""
    return {*field_map.values(), *(name.split(".")[0] for name in field_map.values())}


def holds_mapped(fields: Collection[str], field_map: Mapping[str, str]) -> bool:
    """Whether records with these fields are what a map was written for.

    Fields that it names for an optional target do not tell: many sets have a ``system``.
    """
    needed = {target: name for target, name in field_map.items() if not is_optional(target)}
    return not mapped_columns(needed).isdisjoint(fields)
