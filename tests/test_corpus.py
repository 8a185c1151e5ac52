from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from reap_stream.calibration import builtin, encoding
from reap_stream.calibration.builtin import (
    CODE_DOCUMENT_CHARS,
    code_documents,
    cut_source,
    prose_documents,
)
from reap_stream.calibration.corpus import cut_rows, load_corpus
from reap_stream.calibration.encoding import TextEncoder
from reap_stream.calibration.spec import parse_spec
from reap_stream.errors import CalibrationError, UnsupportedError, UsageError

CHAT_TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('user first') }}{% endif %}"
    "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
VOCAB = 258


def make_tokenizer(*, chat=True, bos=True):
    """One token a byte: ids 1 to 256, with <s> = 0 before and </s> = 257 after a document."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, **{letter: n for n, letter in enumerate(letters, 1)}, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 257)]
        )
    template = CHAT_TEMPLATE if chat else None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


TOKENIZER = make_tokenizer()


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def document(text):
    return [0, *ids_of(text), 257]


def load(*specs, tokenizer=TOKENIZER, **settings):
    defaults = {"samples": None, "sequence_length": 64, "seed": 0, "vocab_size": VOCAB}
    parsed = [parse_spec(str(spec)) for spec in specs]
    return load_corpus(parsed, tokenizer, **{**defaults, **settings})


def tokens_of(corpus):
    return [row.tokens.tolist() for row in corpus.rows]


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


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
    wider = {"messages": [{"role": "user", "content": "x", "name": "n"}], "tools": [{"x": "y"}]}
    other = {name: wider.get(name, value) for name, value in record.items()}
    parquet.write_table(arrow.Table.from_pylist([record, other]), tmp_path / "a.parquet")
    assert tokens_of(load(tmp_path / "a.parquet"))[0] == want


def test_parquet_refusals(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"question": ["a"], "answer": ["b"]}), tmp_path / "q.parquet")
    with pytest.raises(CalibrationError, match=r"q\.parquet: fields answer, question are"):
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
    (b'{"question": "a", "answer": "b"}', "fields answer, question are no known record"),
    (b'{"prompt": "a"}', "it needs text, or messages, or prompt and completion"),
    (b'{"text": 3}', "text must be text, not int"),
    (b'{"text": "\\ud800"}', "no valid Unicode"),
    (b'{"prompt": ["a"], "completion": "b"}', "prompt must be text, not list"),
    (b'{"instruction": "a", "input": 1, "output": "b"}', "input must be text, not int"),
    (b'{"messages": "hi"}', "messages must be a list, not str"),
    (b'{"messages": ["hi"]}', r"messages\[0\] must be an object, not str"),
    (b'{"messages": [{"from": "a", "value": "b"}]}', r"messages\[0\] has fields from, value"),
    (b'{"messages": [{"role": "user"}]}', r"messages\[0\] has fields role: it needs role and"),
    (b'{"messages": [{"role": 1, "content": "a"}]}', "it needs role and content"),
    (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "must be text, not list"),
    (b'{"messages": [{"role": "user", "content": "a"}], "tools": "[]"}', "tools must be a list"),
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


def test_drawing_is_deterministic_ordered_and_uniform(tmp_path):
    np.save(tmp_path / "a.npy", np.stack([np.arange(20)] * 3, axis=1))
    spec = f"{tmp_path / 'a.npy'}:5"
    counts = Counter()
    draws = set()
    for seed in range(400):
        rows = [row[0] for row in tokens_of(load(spec, tokenizer=None, seed=seed))]
        assert rows == sorted(rows)
        assert len(set(rows)) == 5
        counts.update(rows)
        draws.add(tuple(rows))
    assert len(draws) > 380
    # 400 draws of 5 from 20: each row 100 times on average, standard deviation 8.7.
    assert all(55 < counts[row] < 145 for row in range(20))
    again = load(spec, tokenizer=None, seed=3)
    assert again.sha256 == load(spec, tokenizer=None, seed=3).sha256
    assert again.sha256 != load(spec, tokenizer=None, seed=4).sha256


def test_rows_too_short_take_no_place_from_others(tmp_path):
    tokenizer = make_tokenizer(bos=False)
    texts = [letter * (1 if letter in "bdfhjl" else 3) for letter in "abcdefghijkl"]
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    for seed in range(20):
        corpus = load(f"{path}:6", tokenizer=tokenizer, seed=seed)
        assert tokens_of(corpus) == [ids_of(letter * 3) for letter in "acegik"]


def test_samples_limit_the_specs_without_a_count(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((9, 4), np.int64))
    np.save(tmp_path / "b.npy", np.full((9, 4), 2))
    specs = (f"{tmp_path / 'a.npy'}:2", tmp_path / "b.npy")
    corpus = load(*specs, tokenizer=None, samples=4)
    assert [row.source for row in corpus.rows] == [0, 0, 1, 1, 1, 1]
    assert tokens_of(corpus) == [[1] * 4] * 2 + [[2] * 4] * 4
    assert corpus.sources == tuple(str(spec) for spec in specs)
    assert corpus.num_tokens == 24


def test_digest_is_of_ids_and_row_boundaries(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1, 2, 3, 4]]))
    np.save(tmp_path / "b.npy", np.array([[1, 2], [3, 4]]))
    digests = [load(tmp_path / name, tokenizer=None).sha256 for name in ("a.npy", "b.npy")]
    data = [(4).to_bytes(8, "little") + np.array([1, 2, 3, 4], "<i8").tobytes()]
    assert digests[0] == hashlib.sha256(data[0]).hexdigest()
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("specs", "settings", "error", "match"),
    [
        ((), {}, UsageError, "no calibration data"),
        (("builtin:2", "builtin:2"), {}, UsageError, "'builtin:2' is given twice"),
        (("builtin",), {"sequence_length": 1}, UsageError, "at least 2 tokens"),
        (("builtin",), {"samples": 0}, UsageError, "cannot take 0 samples"),
        (("builtin",), {"seed": -1}, UsageError, "seed -1"),
        (("builtin",), {"tokenizer": None}, CalibrationError, "no tokenizer: give a .npy"),
        (("absent.jsonl",), {}, CalibrationError, "absent.jsonl: there is no such"),
        (("builtin:2", "org/name(train):4"), {}, UnsupportedError, "save org/name to a .jsonl"),
    ],
)
def test_refused_before_anything_is_read(specs, settings, error, match):
    with pytest.raises(error, match=match):
        load(*specs, **settings)


def test_other_kinds_of_file_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text\nhello\n")
    with pytest.raises(UsageError, match=r"a\.csv: calibration files end in \.jsonl, \.npy"):
        load(tmp_path / "a.csv")


def test_tokenizer_of_another_model(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "zz"})
    with pytest.raises(CalibrationError, match="ids 0 to 257, the model has 257"):
        load(path, vocab_size=257)


def test_builtin_is_deterministic_and_mixes_halves(monkeypatch):
    monkeypatch.setattr(builtin, "_CODE_MODULES", ("textwrap", "no_such_module", "json.decoder"))
    settings = {"samples": 7, "sequence_length": 128}
    mixed = load("builtin", **settings)
    assert len(mixed.rows) == 7
    assert mixed.sha256 == load("builtin", **settings).sha256
    prose = tokens_of(load("builtin:prose:4", sequence_length=128))
    code = tokens_of(load("builtin:code:3", sequence_length=128))
    want = [row for pair in zip(prose, [*code, None], strict=True) for row in pair if row]
    assert tokens_of(mixed) == want


def test_builtin_text_is_enough_to_calibrate_with():
    prose, code = list(prose_documents()), list(code_documents())
    assert sum(map(len, prose)) > 300_000
    assert sum(map(len, code)) > 1_000_000
    assert prose == list(prose_documents())
    # A document is cut before a statement, so the top level's first line is never indented.
    assert not any(text[0] in " \t" for text in code)
    assert sum(len(text) > CODE_DOCUMENT_CHARS for text in code) < len(code) // 3


@given(
    st.lists(st.sampled_from(["a = 1\n", "  b\n", "\n", "class C:\n", "#\x0c\n"])),
    st.integers(1, 30),
)
def test_cut_source_loses_nothing(lines, max_chars):
    source = "".join(lines)
    pieces = list(cut_source(source, max_chars))
    assert "".join(pieces) == source
    assert all(pieces)
    for piece in pieces[1:]:
        assert not piece[0].isspace()


def test_encoder_agrees_with_the_tokenizer_on_whole_documents():
    encoder = TextEncoder(TOKENIZER, VOCAB)
    want = TOKENIZER("two words\n")["input_ids"]
    assert encoder.encode("two words\n", "here").tolist() == want
    assert (
        np.concatenate(list(encoder.encode_document(["two ", "words\n"], "here"))).tolist() == want
    )


def test_calibration_data_need_no_torch():
    code = (
        "import sys, reap_stream.calibration.corpus;"
        "assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_builtin_text_that_this_python_lacks(monkeypatch):
    monkeypatch.setattr(builtin, "_CODE_MODULES", ("no_such_module", "no_such.module", "sys"))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    for part in ("code", "prose"):
        with pytest.raises(CalibrationError, match=f"builtin:{part} needs"):
            load(f"builtin:{part}")
