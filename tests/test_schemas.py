"""Record forms of the sets that people calibrate on, each against the messages written by hand.

The oracle is the tokenizer's own chat template on those messages.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap_stream.calibration.conversations import Conversation, interpret
from reap_stream.calibration.schemas import FORMS, KNOWN_FIELDS, match_form
from reap_stream.errors import CalibrationError
from tests.chat_templates import CHATML, with_template
from tests.corpora import document, load, make_tokenizer, tokens_of, write_jsonl
from tests.record_sets import CHATS, TEXTS, user

TOKENIZER = with_template(CHATML)


IDS = [name for name, *_ in CHATS]


def expected(messages, tools):
    return TOKENIZER.apply_chat_template(
        messages, tools=tools, tokenize=True, enable_thinking=True, return_dict=False
    )


@pytest.mark.parametrize(("name", "record", "messages", "tools"), CHATS, ids=IDS)
def test_chat_sets(tmp_path, name, record, messages, tools):
    path = write_jsonl(tmp_path / "a.jsonl", record)
    corpus = load(path, tokenizer=TOKENIZER, sequence_length=4096)
    assert tokens_of(corpus) == [expected(messages, tools)]
    assert len(expected(messages, tools)) > len(messages[0]["content"])


@pytest.mark.parametrize(("name", "record", "messages", "tools"), CHATS, ids=IDS)
def test_chat_sets_in_parquet(tmp_path, name, record, messages, tools):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    record = {key: value for key, value in record.items() if value not in ([], {})}
    parquet.write_table(arrow.Table.from_pylist([record, record]), tmp_path / "a.parquet")
    corpus = load(tmp_path / "a.parquet", tokenizer=TOKENIZER, sequence_length=4096)
    assert tokens_of(corpus) == [expected(messages, tools)] * 2


@pytest.mark.parametrize(("name", "record", "text"), TEXTS, ids=[name for name, *_ in TEXTS])
def test_text_sets(tmp_path, name, record, text):
    path = write_jsonl(tmp_path / "a.jsonl", record)
    for tokenizer in (TOKENIZER, make_tokenizer(chat=False)):
        assert tokens_of(load(path, tokenizer=tokenizer)) == [document(text)]


# Where a record has several forms: with a chat template, and without one.
SEVERAL = [
    ({"messages": [user("m")], "text": "t"}, "m", "t"),
    ({"conversations": [user("c")], "messages": None, "text": None}, "c", None),
    ({"prompt": "p", "completion": "c", "text": "t"}, "p", "t"),
    ({"prompt": "p", "completion": None, "instruction": "i", "output": "o"}, "i", "i\no"),
    ({"prompt": "p", "completion": None}, "p", "p"),
    ({"question": "q", "answer": "a", "problem": "p", "solution": "s"}, "q", "q\ns"),
    ({"instruction": "i", "input": "n", "output": "o"}, "i\n\nn", "i\n\nn\no"),
    ({"text": "t", "content": "c"}, "t", "t"),
    ({"system": "s", "prompt": "p", "completion": "c"}, "s", "s\np\nc"),
]


@pytest.mark.parametrize(("record", "with_chat", "without"), SEVERAL)
def test_which_form_counts(record, with_chat, without):
    said = interpret(record, "here", chat=True)
    assert (said if isinstance(said, str) else said.messages[0]["content"]) == with_chat
    if without is None:
        with pytest.raises(CalibrationError, match="here: messages need a chat template"):
            interpret(record, "here", chat=False)
    else:
        assert interpret(record, "here", chat=False) == without


@pytest.mark.parametrize(
    "record",
    [
        {"query": "q", "tools": [{"name": "f"}], "answers": "[]"},
        {"messages": []},
        {"prompt": [user("a")], "completion": "b"},
    ],
)
def test_without_chat_template_only_text_is_taken(record):
    with pytest.raises(CalibrationError, match=r"need a chat template.*--map text=FIELD"):
        interpret(record, "here", chat=False)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(form.required))
def test_every_form_is_found_by_each_of_its_names(form):
    for target, names in form.required.items():
        for name in names:
            others = {others[0]: "x" for other, others in form.required.items() if other != target}
            record = {name: "x", **others}
            found = match_form(record, chat=True)
            assert found is not None
            # An earlier form may want the same names.
            assert FORMS.index(found) <= FORMS.index(form)
            assert all(any(n in record for n in ns) for ns in found.required.values())


@given(st.dictionaries(st.sampled_from([*sorted(KNOWN_FIELDS), "x"]), st.text(max_size=3)))
def test_any_record_of_texts_is_read_or_refused(record):
    with suppress(CalibrationError):
        assert isinstance(interpret(record, "here", chat=True), str | Conversation)
    with suppress(CalibrationError):
        assert isinstance(interpret(record, "here", chat=False), str)


def test_the_page_lists_the_forms_that_there_are():
    page = (Path(__file__).parents[1] / "docs" / "calibration.md").read_text(encoding="utf-8")
    table = page.partition("| fields | what it is |")[2].partition("\n\n")[0]
    rows = [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in table.splitlines()[2:]]
    # Said once for all turns, below the table.
    shared = {"system", "system_prompt", "reasoning_content"}
    for form, row in zip(FORMS, rows, strict=True):
        parts = {**form.required, **form.optional}
        names = {name for names in parts.values() for name in names}
        assert row <= names
        assert names - row <= shared


def test_nothing_but_nulls_is_nothing():
    assert interpret({"text": None}, "here", chat=True) == ""
    assert interpret({"prompt": None, "completion": None}, "here", chat=True) == ""
    assert interpret({"prompt": "", "completion": ""}, "here", chat=True).messages == []


def test_unknown_fields_name_what_was_found():
    with pytest.raises(
        CalibrationError, match=r"f, line 3: fields moral, riddle are .*--map user=FIELD"
    ):
        interpret({"riddle": "a", "moral": "b"}, "f, line 3", chat=True)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"question": "q", "choices": "A, B"}, "choices must be a list of up to 26"),
        ({"question": "q", "choices": ["x"] * 27}, "choices must be a list of up to 26"),
        ({"question": "q", "answer": 4}, "answer must be text, not int"),
        ({"question": ["q"], "answer": "a"}, r"question\[0\] must be an object, not str"),
        ({"query": "q", "tools": "[", "answers": "[]"}, "tools: is text and no JSON"),
        ({"query": "q", "tools": "[]", "answers": "none"}, "answers: is text and no JSON"),
        ({"query": "q", "tools": "[]", "answers": "[3]"}, r"answers\[0\] must be an object"),
        ({"chosen": "Human: a", "rejected": "b"}, "chosen: is text and no JSON"),
        ({"system": 1, "prompt": "p", "completion": "c"}, "system must be text, not int"),
    ],
)
def test_fields_of_the_wrong_kind(record, match):
    with pytest.raises(CalibrationError, match=f"here: {match}"):
        interpret(record, "here", chat=True)


def test_choices_may_be_a_table():
    record = {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}}
    assert interpret(record, "here", chat=True).messages == [user("q\nA. x\nB. y")]
