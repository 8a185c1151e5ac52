"""Messages and tool calls of every spelling, and those that are none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap_stream.calibration.messages import (
    join_reasoning,
    normalise_messages,
    split_reasoning,
)
from reap_stream.calibration.tools import normalise_calls
from reap_stream.errors import CalibrationError


def normalised(*messages):
    return normalise_messages(list(messages), "here")


@pytest.mark.parametrize(
    ("spelled", "role"),
    [
        *(("system", "system"), ("developer", "system")),
        *((name, "user") for name in ("user", "human", "Human ", "prompter")),
        *((name, "assistant") for name in ("assistant", "gpt", "GPT", "model", "chatgpt", "bot")),
        *((name, "tool") for name in ("tool", "function", "observation", "ipython")),
    ],
)
def test_roles(spelled, role):
    for message in ({"role": spelled, "content": "x"}, {"from": spelled, "value": "x"}):
        assert normalised(message) == [{"role": role, "content": "x"}]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("x", "x"),
        ([{"type": "text", "text": "x"}, {"type": "text", "text": "y"}], "xy"),
        ([{"text": "x"}, "y", {"type": "output_text", "text": "z"}], "xyz"),
        ([], ""),
    ],
)
def test_contents(content, text):
    assert normalised({"role": "user", "content": content}) == [{"role": "user", "content": text}]


def test_a_result_that_is_an_object_is_its_json():
    (message,) = normalised({"role": "tool", "content": {"ü": 1}})
    assert message["content"] == '{"ü": 1}'


def test_tool_results_keep_their_names_and_ids():
    message = {"role": "tool", "content": "x", "name": "f", "tool_call_id": "c1"}
    assert normalised(message) == [message]


def test_unknown_fields_stay_and_nulls_go():
    message = {"role": "user", "content": "x", "name": None, "current_date": "today"}
    assert normalised(message) == [{"role": "user", "content": "x", "current_date": "today"}]


FUNCTION = {"name": "f", "arguments": {"a": [1, "ü"]}}
SPELLINGS = [
    [{"type": "function", "function": FUNCTION}],
    [{"function": {**FUNCTION, "arguments": json.dumps(FUNCTION["arguments"])}}],
    [FUNCTION],
    FUNCTION,
    json.dumps([FUNCTION]),
    json.dumps(FUNCTION),
    [{"name": "f", "parameters": FUNCTION["arguments"]}],
]


@pytest.mark.parametrize("calls", SPELLINGS)
def test_calls(calls):
    want = {"type": "function", "id": "functions.f:0", "function": FUNCTION}
    (message,) = normalised({"role": "assistant", "content": None, "tool_calls": calls})
    assert message == {"role": "assistant", "content": "", "tool_calls": [want]}
    (message,) = normalised({"role": "assistant", "function_call": calls})
    assert message["tool_calls"] == [want]
    (message,) = normalised({"from": "function_call", "value": calls})
    assert message == {"role": "assistant", "content": "", "tool_calls": [want]}


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (None, {}),
        ("", {}),
        ("{}", {}),
        ('{"a": 1}', {"a": 1}),
        ("[1]", "[1]"),
        ("ls -l", "ls -l"),
        ('"{}"', '"{}"'),
    ],
)
def test_arguments_are_objects_where_they_hold_one(arguments, want):
    (call,) = normalise_calls([{"name": "f", "arguments": arguments}], "here")
    assert call["function"]["arguments"] == want


def test_results_answer_the_calls_before_them():
    messages = normalised(
        {"role": "assistant", "tool_calls": [{"name": "f"}, {"name": "g"}]},
        {"role": "tool", "content": "of f"},
        {"role": "tool", "content": "of g"},
        {"role": "assistant", "tool_calls": [{"name": "f", "id": "mine"}, {"name": "g"}]},
        {"role": "tool", "content": "of g", "tool_call_id": "functions.g:3"},
        {"role": "tool", "content": "of mine"},
        {"role": "tool", "content": "of nothing"},
    )
    ids = [message.get("tool_call_id") for message in messages if message["role"] == "tool"]
    assert ids == ["functions.f:0", "functions.g:1", "functions.g:3", "mine", None]
    assert [call["id"] for call in messages[3]["tool_calls"]] == ["mine", "functions.g:3"]


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ("<think>\nr\n</think>\n\na", ("r", "a")),
        ("<think>r</think>a", ("r", "a")),
        ("  <think>\n\n r s\n\n</think>\na\n", ("r s", "a\n")),
        # Where the template's prompt holds the opening mark.
        ("r\n</think>\n\na", ("r", "a")),
        ("<think></think>a", ("", "a")),
        ("a", ("", "a")),
        ("<think>never closed", ("", "<think>never closed")),
        ("say <think> and </think> so", ("", "say <think> and </think> so")),
    ],
)
def test_reasoning_in_the_content(content, want):
    assert split_reasoning(content) == want
    (message,) = normalised({"role": "assistant", "content": content})
    assert message.get("reasoning_content", "") == want[0]
    assert message["content"] == want[1]


@given(st.text("ab \n", min_size=1).filter(str.strip), st.text("ab\n").map(str.strip))
def test_reasoning_is_found_where_it_was_written(reasoning, answer):
    assert split_reasoning(join_reasoning(reasoning, answer)) == (reasoning.strip(), answer)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_field(name):
    want = {"role": "assistant", "content": "a", "reasoning_content": "r", "thinking": "r"}
    assert normalised({"role": "assistant", "content": "a", name: " r\n"}) == [want]
    parts = [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}]
    assert normalised({"role": "assistant", "content": parts}) == [want]
    # With a field of its own, what stands in the content is no reasoning.
    (message,) = normalised({"role": "assistant", "content": "<think>x</think>a", name: "r"})
    assert message["content"] == "<think>x</think>a"


def test_columns_of_messages_are_rows():
    columns = {"role": ["user", "assistant"], "content": ["q", "a"], "tool_calls": [None, None]}
    want = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert normalise_messages(columns, "here") == want
    assert normalise_messages({"from": [], "value": []}, "here") == []
    with pytest.raises(CalibrationError, match="here must be a list, not dict"):
        normalise_messages({"role": ["user"], "content": []}, "here")


def test_an_answer_may_be_null():
    message = {"role": "assistant", "content": None}
    assert normalise_messages([message], "here") == [{"role": "assistant", "content": ""}]


MALFORMED = [
    ("[", r"here: is text and no JSON"),
    ("[" * 100_000, r"here: is text and no JSON"),
    ("3", r"here must be a list, not int"),
    ({"role": "user"}, r"here must be a list, not dict"),
    (["x"], r"here\[0\] must be an object, not str"),
    ([None], r"here\[0\] must be an object, not NoneType"),
    ([{}], r"here\[0\] has fields none: it needs role and content"),
    ([{"role": "user"}], r"here\[0\] has fields role: it needs role and content"),
    ([{"role": "user", "content": None}], r"has fields content, role: it needs role"),
    ([{"content": "x"}], r"has fields content: it needs role"),
    ([{"role": 1, "content": "x"}], r"it needs role and content"),
    ([{"role": "narrator", "content": "x"}], r"role 'narrator' is none of system, developer"),
    ([{"role": "user", "content": 3}], r"content must be text, not int"),
    ([{"role": "user", "content": {"a": 1}}], r"content must be text, not dict"),
    ([{"role": "user", "content": [3]}], r"content\[0\] must be text, not int"),
    (
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "x"}, {"type": "image", "url": "u"}],
            }
        ],
        r"content\[1\] is of type 'image' with fields type, url: only text",
    ),
    ([{"role": "user", "content": [{"type": "text"}]}], r"type 'text' with fields type"),
    ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"only text"),
    ([{"role": "user", "content": [{"type": ["text"], "text": "x"}]}], r"only text"),
    ([{"role": "assistant", "content": "x", "reasoning": 1}], r"reasoning must be text, not int"),
    ([{"role": "assistant", "tool_calls": 3}], r"tool_calls must be a list, not int"),
    ([{"role": "assistant", "tool_calls": "f()"}], r"tool_calls: is text and no JSON"),
    ([{"role": "assistant", "tool_calls": ["f"]}], r"tool_calls\[0\] must be an object"),
    (
        [{"role": "assistant", "tool_calls": [{"id": "1"}]}],
        r"has fields id: a tool call needs a name",
    ),
    ([{"role": "assistant", "tool_calls": [{"function": 3}]}], r"a tool call needs a name"),
    ([{"from": "function_call", "value": "f()"}], r"tool_calls: is text and no JSON"),
    ([{"from": "function_call", "value": None}], r"it needs role and content"),
]


@pytest.mark.parametrize(("value", "match"), MALFORMED)
def test_malformed_messages_are_named(value, match):
    with pytest.raises(CalibrationError, match=match):
        normalise_messages(value, "here")


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["role", "content", "tool_calls", "function", "name", "type"]),
                inner | st.sampled_from(["user", "assistant", "text"]),
            )
        ),
        max_leaves=8,
    )
)
def test_whatever_it_is_it_is_read_or_refused(value):
    try:
        messages = normalise_messages(value, "here")
    except CalibrationError:
        return
    assert all(isinstance(message["content"], str) for message in messages)
    assert all(message["role"] in ("system", "user", "assistant", "tool") for message in messages)
