"""The calibration text that the package ships."""

from __future__ import annotations

import json
from importlib import resources
from itertools import chain, zip_longest

import pytest

from reap_stream.calibration.builtin import (
    BUILTIN_NAMES,
    CONVERSATIONS,
    DOCUMENTS,
    builtin_path,
)
from reap_stream.errors import CalibrationError
from tests.corpora import TOKENIZER, load, make_tokenizer, tokens_of

PLAIN = make_tokenizer(chat=False)
DATA = resources.files("reap_stream") / "data" / "builtin"


def records(part):
    return [json.loads(line) for line in builtin_path(part).read_text("utf-8").splitlines()]


def texts(part):
    return [record["text"] for record in records(part)]


def test_all_of_it_is_a_megabyte_at_most_and_says_its_licence():
    files = {path.name: path for path in DATA.iterdir()}
    assert sum(path.stat().st_size for path in files.values()) <= 1_000_000
    assert {f"{part}.jsonl" for part in (*DOCUMENTS, *CONVERSATIONS)} < set(files)
    readme = files["README.md"].read_text("utf-8")
    assert all(name in readme for name in files if name != "README.md")
    assert "Python Software Foundation" in files["LICENSE.python.txt"].read_text("utf-8")


@pytest.mark.parametrize("part", DOCUMENTS)
def test_documents_are_many_and_differ(part):
    found = texts(part)
    assert sum(map(len, found)) > 200_000
    assert len(set(found)) == len(found) >= 30
    assert max(map(len, found)) <= 8_000
    assert len({record["source"] for record in records(part)}) == len(found)


def test_code_is_whole_statements():
    for text in texts("code"):
        # Syntax of a version that this Python does not know yet is no fault of the cut.
        compile(text, "excerpt", "exec", dont_inherit=True)


@pytest.mark.parametrize("part", CONVERSATIONS)
def test_conversations_are_well_formed(part):
    found = records(part)
    assert len(found) > 150
    for record in found:
        roles = [message["role"] for message in record["messages"]]
        spoken = roles[roles[0] == "system" :]
        assert spoken[0] == "user"
        assert spoken[-1] == "assistant"
        assert "system" not in spoken
        assert all(
            message["content"] or message.get("tool_calls") for message in record["messages"]
        )
    named = [[tool["function"]["name"] for tool in record.get("tools", [])] for record in found]
    for record, known in zip(found, named, strict=True):
        calls = [c for m in record["messages"] for c in m.get("tool_calls", [])]
        assert bool(calls) == (part == "tools")
        assert all(call["function"]["name"] in known for call in calls)


def test_some_answers_were_thought_about():
    messages = [m for record in records("chat") for m in record["messages"]]
    reasoned = [message for message in messages if message.get("reasoning_content")]
    assert 30 < len(reasoned) < len(messages) // 4
    assert {message["role"] for message in reasoned} == {"assistant"}


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_every_name_gives_rows(name):
    corpus = load(f"builtin:{name}:8", sequence_length=128)
    assert len(corpus.rows) == 8
    assert corpus.sha256 == load(f"builtin:{name}:8", sequence_length=128).sha256
    assert corpus.origins[0].record()["name"] == name


def interleaved(parts):
    return [row for row in chain.from_iterable(zip_longest(*parts)) if row]


def test_mixed_is_rows_of_each_in_equal_number():
    counts = {"code": 2, "prose": 2, "tools": 2, "chat": 1}
    parts = [
        tokens_of(load(f"builtin:{part}:{count}", sequence_length=128))
        for part, count in counts.items()
    ]
    assert tokens_of(load("builtin:7", sequence_length=128)) == interleaved(parts)


def test_documents_go_on_in_the_next_row():
    documents = [TOKENIZER(text)["input_ids"] for text in texts("prose")]
    rows = [ids[start : start + 100] for ids in documents for start in range(0, len(ids), 100)]
    want = [row for row in rows if len(row) > 1]
    assert tokens_of(load("builtin:prose", sequence_length=100)) == want


def test_without_a_chat_template_mixed_is_documents_alone():
    corpus = load("builtin:7", tokenizer=PLAIN, sequence_length=128)
    parts = [
        tokens_of(load(spec, sequence_length=128)) for spec in ("builtin:code:4", "builtin:prose:3")
    ]
    assert tokens_of(corpus) == interleaved(parts)
    assert corpus.notes == (
        "builtin:7: code and prose alone: the tokenizer has no chat template",
    )  # fmt: skip


@pytest.mark.parametrize("part", CONVERSATIONS)
def test_conversations_need_a_chat_template(part):
    with pytest.raises(CalibrationError, match=r"no chat template: give builtin:code or builtin:p"):
        load(f"builtin:{part}:4", tokenizer=PLAIN)


def test_it_is_read_wherever_one_stands(monkeypatch, tmp_path):
    want = load("builtin:4").sha256
    monkeypatch.chdir(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert load("builtin:4").sha256 == want
