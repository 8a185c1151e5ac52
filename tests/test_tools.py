"""Tools of every spelling, and those that are none."""

from __future__ import annotations

import json

import pytest

from reap_stream.calibration.tools import normalise_tools
from reap_stream.errors import CalibrationError

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
        {"function": {"name": "f", "parameters": SCHEMA}},
        {"name": "f", "parameters": SCHEMA},
        {"type": "custom", "name": "f", "input_schema": SCHEMA},
        {"name": "f", "parameters": {"a": {"type": "str"}}},
    ],
)
def test_tools_are_wrapped(tool):
    want = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    assert normalise_tools([tool], "here") == want
    assert normalise_tools(json.dumps([tool]), "here") == want
    assert normalise_tools(tool, "here") == want


def test_no_tools():
    for value in ([], "[]", ""):
        assert normalise_tools(value, "here") is None


@pytest.mark.parametrize(
    ("spelled", "want"),
    [
        ("str", {"type": "string"}),
        ("int, optional", {"type": "integer"}),
        ("float, default 1.0", {"type": "number"}),
        ("bool", {"type": "boolean"}),
        ("List[int]", {"type": "array", "items": {"type": "integer"}}),
        ("list", {"type": "array"}),
        ("List[List[str]], optional", {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}),
        ("Dict[str, Any]", {"type": "object"}),
        ("Tuple[int, str]", {"type": "array"}),
        ("Optional[str]", {"type": "string"}),
        ("Union[int, str]", {"type": "Union[int, str]"}),
        ("array", {"type": "array"}),
        ("Callable[[float], float]", {"type": "Callable[[float], float]"}),
        ("a date", {"type": "a date"}),
    ],
)  # fmt: skip
def test_python_types_become_those_of_json_schema(spelled, want):
    tool = {"name": "f", "parameters": {"p": {"description": "d", "type": spelled}}}
    (wrapped,) = normalise_tools([tool], "here")
    parameters = wrapped["function"]["parameters"]
    assert parameters["properties"] == {"p": {"description": "d", **want}}
    assert parameters.get("required", []) == ([] if "ptional" in spelled else ["p"])


def test_parameters_that_are_called_like_schema_words():
    for name in ("type", "properties"):
        tool = {"name": "f", "parameters": {name: {"type": "int", "default": 1}}}
        (wrapped,) = normalise_tools([tool], "here")
        properties = wrapped["function"]["parameters"]["properties"]
        assert properties == {name: {"type": "integer", "default": 1}}
    tool = {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}
    assert normalise_tools([tool], "here") == [{"type": "function", "function": tool}]


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("[", "here: is text and no JSON"),
        (3, "here must be a list, not int"),
        (["f"], r"here\[0\] must be an object, not str"),
        ([{"type": "function"}], r"here\[0\] has fields type: a tool needs a name"),
        ([{"name": 3}], "a tool needs a name"),
        ([{"function": "f"}], "a tool needs a name"),
    ],
)
def test_malformed_tools_are_named(value, match):
    with pytest.raises(CalibrationError, match=match):
        normalise_tools(value, "here")
