"""Calibration data: every kind of file, row by row."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap_stream.calibration import encoding
from reap_stream.calibration.sources import cut_rows
from reap_stream.errors import CalibrationError
from tests.corpora import VOCAB, document, ids_of, load, make_tokenizer, tokens_of, write_jsonl

SCHEMAS = [
    ({"text": "Hello wörld"}, document("Hello wörld")),
    ({"text": "as is", "meta": 3, "prompt": "no"}, document("as is")),
    ({"text": None, "prompt": "a", "completion": "b"}, ids_of("<user>a<assistant>b")),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        ids_of("<user>a<assistant>b"),
    ),
    (
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]},
        ids_of("[f]<user>a"),
    ),
    ({"messages": [{"role": "user", "content": "a"}], "tools": None}, ids_of("<user>a")),
    ({"prompt": "a", "completion": "b"}, ids_of("<user>a<assistant>b")),
    ({"instruction": "a", "output": "b"}, ids_of("<user>a<assistant>b")),
    ({"instruction": "a", "input": "c", "output": "b"}, ids_of("<user>a\n\nc<assistant>b")),
    ({"instruction": "a", "input": "", "output": "b"}, ids_of("<user>a<assistant>b")),
]


@pytest.mark.parametrize(("record", "want"), SCHEMAS)
def test_schemas(tmp_path, record, want):
    assert tokens_of(load(write_jsonl(tmp_path / "a.jsonl", record))) == [want]


@pytest.mark.parametrize(("record", "want"), SCHEMAS)
def test_parquet_holds_the_same(tmp_path, record, want):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    # The second record gives every struct a field that the first has not.
    tool = {"name": "g", "x": "y"}
    wider = {"messages": [{"role": "user", "content": "x", "name": "n"}], "tools": [tool]}
    other = {name: wider.get(name, value) for name, value in record.items()}
    parquet.write_table(arrow.Table.from_pylist([record, other]), tmp_path / "a.parquet")
    assert tokens_of(load(tmp_path / "a.parquet"))[0] == want


def test_parquet_refusals(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"riddle": ["a"], "moral": ["b"]}), tmp_path / "q.parquet")
    with pytest.raises(CalibrationError, match=r"q\.parquet: fields moral, riddle are no known"):
        load(tmp_path / "q.parquet")
    parquet.write_table(
        arrow.table({"text": ["some text", "x"] * 300 + [""]}), tmp_path / "t.parquet"
    )
    assert len(load(tmp_path / "t.parquet").rows) == 600
    parquet.write_table(arrow.table({"text": [1]}), tmp_path / "n.parquet")
    with pytest.raises(CalibrationError, match=r"n\.parquet, row 1: text must be text, not int"):
        load(tmp_path / "n.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(CalibrationError, match=r"bad\.parquet: cannot be read as Parquet"):
        load(tmp_path / "bad.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(CalibrationError, match=r'pip install "reap-stream\[data\]"'):
        load(tmp_path / "a.parquet")


def test_without_chat_template_turns_are_joined(tmp_path):
    tokenizer = make_tokenizer(chat=False)
    path = write_jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "input": "c", "output": "b"},
        {"instruction": "a", "output": ""},
    )
    want = [document("a\nb"), document("a\n\nc\nb"), document("a")]
    assert tokens_of(load(path, tokenizer=tokenizer)) == want
    write_jsonl(path, {"text": "fine"}, {"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(CalibrationError, match=r"a\.jsonl, line 2: messages need a chat template"):
        load(path, tokenizer=tokenizer)


MALFORMED = [
    (b'{"text": "a"', "is no JSON"),
    (b"\xff\xfe{}", "is no JSON"),
    (b"[" * 100_000, "is no JSON"),
    (b"[1]", "must be an object with fields, not list"),
    (b'"text"', "must be an object with fields, not str"),
    (b"{}", "fields none are no known record"),
    (b'{"riddle": "a", "moral": "b"}', "fields moral, riddle are no known record.*--map"),
    (b'{"prompt": "a"}', "without it needs messages, or .*prompt and completion"),
    (b'{"text": 3}', "text must be text, not int"),
    (b'{"text": "\\ud800"}', "no valid Unicode"),
    (b'{"prompt": ["a"], "completion": "b"}', r"prompt\[0\] must be an object, not str"),
    (b'{"instruction": "a", "input": 1, "output": "b"}', "input must be text, not int"),
    (b'{"messages": "hi"}', "messages: is text and no JSON"),
    (b'{"messages": "3"}', "messages must be a list, not int"),
    (b'{"messages": ["hi"]}', r"messages\[0\] must be an object, not str"),
    (b'{"messages": [{"from": "a", "value": "b"}]}', r"messages\[0\]: role 'a' is none of system"),
    (b'{"messages": [{"role": "user"}]}', r"messages\[0\] has fields role: it needs role and"),
    (b'{"messages": [{"role": 1, "content": "a"}]}', "it needs role and content"),
    (
        b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        "type 'image' .*only text",
    ),
    (
        b'{"messages": [{"role": "user", "content": "a"}], "tools": "3"}',
        "tools must be a list, not int",
    ),
    (b'{"messages": [{"role": "assistant", "content": "a"}]}', "template refuses.*user first"),
]


@pytest.mark.parametrize(("line", "match"), MALFORMED)
def test_malformed_lines_are_named(tmp_path, line, match):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(CalibrationError, match=rf"(?s)bad\.jsonl, line 3.*{match}"):
        load(tmp_path / "bad.jsonl")


def test_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "ab"}\r\n\r\n  \n{"text": "cd"}')
    corpus = load(tmp_path / "a.jsonl")
    assert tokens_of(corpus) == [document("ab"), document("cd")]
    assert corpus.notes == ()


def test_rows_too_short_are_skipped_and_counted(tmp_path):
    tokenizer = make_tokenizer(bos=False)
    texts = ["", "  \n", "a", "ab", None, "abc"]
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    corpus = load(f"{path}:5", tokenizer=tokenizer)
    assert tokens_of(corpus) == [ids_of("ab"), ids_of("abc")]
    assert corpus.notes == (
        f"{path}:5: 4 rows of under 2 tokens skipped",
        f"{path}:5: 2 rows, 5 were asked for",
    )
    write_jsonl(path, {"text": "a"}, {"messages": []})
    with pytest.raises(CalibrationError, match=r"no row of at least 2 tokens \(2 shorter ones\)"):
        load(path, tokenizer=tokenizer)
    path.write_text("")
    with pytest.raises(CalibrationError, match="no row of at least 2 tokens"):
        load(path)


def test_long_rows_are_cut_and_hold_nothing_else(tmp_path):
    corpus = load(write_jsonl(tmp_path / "a.jsonl", {"text": "x" * 1000}), sequence_length=5)
    assert tokens_of(corpus) == [document("xxxx")[:5]]
    assert corpus.rows[0].tokens.base is None


def test_txt_is_one_document_in_consecutive_rows(tmp_path, monkeypatch):
    text = "".join(f"line {n} ünd\n\n  {'x' * (n % 7)}\r\n" for n in range(200))
    (tmp_path / "a.txt").write_bytes(text.encode())
    whole = document(text)
    # However the text is cut for the tokenizer, the tokens are those of the whole.
    for piece in (1, 50, 1000, 1 << 18):
        monkeypatch.setattr(encoding, "_PIECE_CHARS", piece)
        rows = tokens_of(load(tmp_path / "a.txt", sequence_length=60))
        assert [token for row in rows for token in row] == whole
        assert all(len(row) == 60 for row in rows[:-1])


def test_txt_pieces_are_cut_before_words(monkeypatch):
    monkeypatch.setattr(encoding, "_PIECE_CHARS", 6)
    assert list(encoding._pieces(["ab\ncd\n", " ef\n\ngh", "ijklmnop"])) == [
        "ab\n",
        "cd\n ef\n\n",
        "ghijklmnop",
        "",
    ]


def test_txt_that_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(CalibrationError, match=r"a\.txt: cannot be read as UTF-8"):
        load(tmp_path / "a.txt")


@given(st.lists(st.lists(st.integers(0, 99), max_size=7), max_size=7), st.integers(1, 6))
def test_cut_rows_keeps_every_token(pieces, length):
    rows = list(cut_rows((np.array(piece, np.int64) for piece in pieces), length))
    assert [token for row in rows for token in row] == [
        token for piece in pieces for token in piece
    ]
    assert all(len(row) == length for row in rows[:-1])
    assert all(0 < len(row) <= length for row in rows)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_ids_are_taken_as_they_are(tmp_path, dtype, order):
    ids = np.random.default_rng(0).integers(0, VOCAB, (6, 10))
    np.save(tmp_path / "a.npy", np.array(ids, dtype, order=order))
    corpus = load(tmp_path / "a.npy", tokenizer=None, sequence_length=7)
    assert tokens_of(corpus) == ids[:, :7].tolist()
    assert corpus.rows[0].tokens.dtype == np.int64
    assert corpus.num_tokens == 42


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.array([[1, 2], [3, VOCAB]]), rf"{VOCAB} at row 1, column 1 .* vocabulary of {VOCAB}"),
        (np.array([[1, -100]]), "-100 at row 0, column 1"),
        (np.array([1, 2]), r"int64 \[2\]: it must be int64 or int32 \[rows, tokens\]"),
        (np.array([[1.0, 2.0]]), "float64"),
        (np.array([[1, 2]], np.uint16), "uint16"),
        (np.array([[1], [2]]), "no row of at least 2 tokens"),
        (np.array([[{"a": 1}, 2]], object), "cannot be read as an array"),
        (np.zeros((0, 5), np.int64), "a.npy"),
    ],
)
def test_npy_refusals(tmp_path, array, match):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(CalibrationError, match=match):
        load(tmp_path / "a.npy", tokenizer=None)


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"\x93NUMPY\x01\0\x05\0{{{{\n"]
)
def test_npy_that_is_none(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(CalibrationError, match="cannot be read as an array"):
        load(tmp_path / "a.npy")
    np.save(tmp_path / "whole.npy", np.ones((50, 50), np.int64))
    (tmp_path / "a.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-8])
    with pytest.raises(CalibrationError, match="cannot be read as an array"):
        load(tmp_path / "a.npy")
