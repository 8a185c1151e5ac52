"""Fields named by hand: ``--map``, from the command line to the run record."""

from __future__ import annotations

import json

import pytest

from reap_stream.calibration.conversations import interpret
from reap_stream.calibration.schemas import MAP_TARGETS, look_up, parse_field_map
from reap_stream.cli import build_parser
from reap_stream.commands import run_settings
from reap_stream.errors import CalibrationError, UsageError
from reap_stream.evaluation.command import eval_settings
from reap_stream.settings import RunSettings
from tests.corpora import document, ids_of, load, make_tokenizer, tokens_of, write_jsonl

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def said(record, field_map, *, chat=True):
    return interpret(record, "f.jsonl, line 3", chat=chat, field_map=dict(field_map))


@pytest.mark.parametrize(
    ("record", "field_map", "messages"),
    [
        (
            {"riddle": "q", "moral": "a"},
            {"user": "riddle", "assistant": "moral"},
            [QUESTION, ANSWER],
        ),
        (
            {"turn": {"q": "q", "a": "a"}},
            {"user": "turn.q", "assistant": "turn.a"},
            [QUESTION, ANSWER],
        ),
        ({"turns": [{"q": "q"}]}, {"user": "turns.0.q"}, [QUESTION]),
        ({"a.b": "q", "a": {"b": "x"}}, {"user": "a.b"}, [QUESTION]),
        (
            {"log": json.dumps([QUESTION, ANSWER])},
            {"messages": "log"},
            [QUESTION, ANSWER],
        ),
        (
            {"messages": [QUESTION], "answer": "a", "why": "w"},
            {"messages": "messages", "assistant": "answer", "reasoning": "why"},
            [QUESTION, {**ANSWER, "reasoning_content": "w", "thinking": "w"}],
        ),
        (
            {"q": "q", "s": "s"},
            {"system": "s", "user": "q"},
            [{"role": "system", "content": "s"}, QUESTION],
        ),
        # What a map may leave out, and a null.
        ({"q": "q"}, {"system": "s", "user": "q", "tools": "t", "reasoning": "r"}, [QUESTION]),
        ({"q": "q", "a": None}, {"user": "q", "assistant": "a"}, [QUESTION]),
        # The map wins over what the fields would mean by themselves.
        ({"prompt": "no", "completion": "no", "q": "q"}, {"user": "q"}, [QUESTION]),
    ],
)
def test_fields_are_where_the_map_says(record, field_map, messages):
    assert said(record, field_map).messages == messages


def test_tools_and_text():
    tool = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    record = {"q": "q", "apis": json.dumps([tool])}
    found = said(record, {"user": "q", "tools": "apis"})
    assert found.tools == [{"type": "function", "function": tool}]
    assert said({"body": "b", "text": "no"}, {"text": "body"}) == "b"
    assert said({"q": "q", "a": "a"}, {"user": "q", "assistant": "a"}, chat=False) == "q\na"


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"q": "q", "b": 1}, r"f\.jsonl, line 3: has no a, .* for assistant; it has fields b, q"),
        ({"a": "a", "q": {}}, r"q must be text, not dict"),
        ({"x": 1}, r"fields x are no known record, nor are there q, a that --map names"),
    ],
)
def test_records_that_lack_them(record, match):
    with pytest.raises(CalibrationError, match=match):
        said(record, {"user": "q", "assistant": "a"})


def test_a_path_that_leads_nowhere():
    record = {"a": {"b": [1]}}
    for path in ("a.c", "a.b.1", "a.b.x", "a.b.0.c", "c", ""):
        assert look_up(record, path) == (False, None)
    assert look_up(record, "a.b.0") == (True, 1)


def test_parsing():
    assert parse_field_map(["user=q, assistant = a.b"]) == (("user", "q"), ("assistant", "a.b"))
    assert parse_field_map(["user=q", "system=s=t"]) == (("user", "q"), ("system", "s=t"))
    assert parse_field_map([]) == ()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("prompt=q", f"no target 'prompt': {', '.join(MAP_TARGETS)}"),
        ("user", "'user' is no TARGET=FIELD"),
        ("user=", "'user=' is no TARGET=FIELD"),
        ("=q", "'=q' is no TARGET=FIELD"),
        ("user=q,", "'' is no TARGET=FIELD"),
        ("user=a,user=b", "names user twice"),
        ("text=a,user=b", "a whole document"),
        ("system=a", "needs text, messages, user or assistant"),
    ],
)
def test_maps_that_are_refused(text, match):
    with pytest.raises(UsageError, match=match):
        parse_field_map([text])


def test_from_the_command_line_to_the_record(tmp_path):
    arguments = ["observe", str(tmp_path), "--output", "s", "--calibration", "c.jsonl"]
    given = build_parser().parse_args(
        [*arguments, "--map", "user=q,assistant=a", "--map", "system=s"]
    )
    run = run_settings(given)
    assert run.field_map == (("user", "q"), ("assistant", "a"), ("system", "s"))
    assert json.loads(json.dumps(run.record()))["field_map"] == dict(run.field_map)
    plain = run_settings(build_parser().parse_args(arguments))
    assert plain.field_map == ()
    measured = ["eval", str(tmp_path), "--text", "c.jsonl", "--map", "text=body"]
    evaluation = eval_settings(build_parser().parse_args(measured))
    assert evaluation.run(tmp_path).field_map == (("text", "body"),)
    with pytest.raises(UsageError, match="no target 'x'"):
        RunSettings(model=tmp_path, calibration=("builtin",), field_map=(("x", "y"),))


def test_in_a_mix_it_is_for_those_that_have_the_fields(tmp_path):
    mine = write_jsonl(tmp_path / "mine.jsonl", {"riddle": "q", "moral": "a"})
    other = write_jsonl(tmp_path / "other.jsonl", {"text": "t"})
    pairs = (("user", "riddle"), ("assistant", "moral"))
    corpus = load(mine, other, field_map=pairs)
    assert tokens_of(corpus) == [ids_of("<user>q<assistant>a"), document("t")]
    assert corpus.notes == (
        f"{other}: has none of the fields that --map names (riddle, moral), read by its own",
    )
    with pytest.raises(CalibrationError, match=r"--map names riddle, moral, and no record"):
        load(other, field_map=pairs)
    with pytest.raises(CalibrationError, match=r"mine\.jsonl, line 1: fields moral, riddle"):
        load(mine)
    with pytest.raises(UsageError, match="no target"):
        load(mine, field_map=(("x", "riddle"),))


def test_parquet_columns_that_only_a_map_knows(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"turn": {"q": "q", "a": "a", "n": 1}, "rest": "x"}]
    parquet.write_table(arrow.Table.from_pylist(records), tmp_path / "a.parquet")
    corpus = load(tmp_path / "a.parquet", field_map=(("user", "turn.q"), ("assistant", "turn.a")))
    assert tokens_of(corpus) == [ids_of("<user>q<assistant>a")]
    with pytest.raises(
        CalibrationError, match=r"a\.parquet: fields rest, turn are no known record"
    ):
        load(tmp_path / "a.parquet")


def test_without_a_chat_template(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": [QUESTION], "plain": "text"})
    tokenizer = make_tokenizer(chat=False)
    with pytest.raises(CalibrationError, match="--map text=FIELD"):
        load(path, tokenizer=tokenizer)
    corpus = load(path, tokenizer=tokenizer, field_map=(("text", "plain"),))
    assert tokens_of(corpus) == [document("text")]
