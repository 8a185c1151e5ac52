"""Malformed and malicious safetensors files: one row a rule, then random damage."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from reap_stream.checkpoint.header import parse_header, read_header
from reap_stream.errors import CheckpointError

MAX_HEADER = 100_000_000


def framed(text, data=b""):
    """A file whose length prefix is true of `text`."""
    return struct.pack("<Q", len(text)) + text + data


def described(header, data=b""):
    return framed(json.dumps(header).encode(), data)


def entry(dtype="U8", shape=(4,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def without(field):
    return {key: value for key, value in entry().items() if key != field}


DATA = b"\0" * 4
BIG = 10**18

# id, content of the file, what the message must say.
ATTACKS = [
    ("empty file", b"", "0 bytes; a safetensors file has at least 8"),
    ("seven bytes", b"\0" * 7, "7 bytes; a safetensors file has at least 8"),
    ("header past the end", struct.pack("<Q", 50) + b"{}", "header of 50 bytes in a file of 10"),
    ("header over the limit", struct.pack("<Q", MAX_HEADER + 1) + b"{}", "at most 100000000"),
    ("header of 2**64-1 bytes", b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
    ("no JSON at all", struct.pack("<Q", 0), "not with '{'"),
    ("not UTF-8", framed(b'{"\xff":1}'), "not valid UTF-8"),
    ("UTF-16", framed('{"a":1}'.encode("utf-16")), "not with '{'"),
    ("byte order mark", framed("\ufeff{}".encode()), "not with '{'"),
    ("leading space", framed(b" {}"), "not with '{'"),
    ("broken JSON", framed(b'{"a":'), "not valid JSON"),
    ("array", framed(b"[]"), "not with '{'"),
    ("trailing garbage", framed(b"{} x"), "not valid JSON"),
    ("two objects", framed(b"{}{}"), "not valid JSON"),
    ("trailing NUL", framed(b"{}\0\0\0\0\0\0"), "not valid JSON"),
    ("NaN", framed(b'{"a":NaN}'), "NaN is not JSON"),
    ("Infinity", framed(b'{"a":-Infinity}'), "-Infinity is not JSON"),
    ("duplicate tensor", framed(b'{"a":1,"a":2}'), "'a' stands twice"),
    ("duplicate field", framed(b'{"a":{"dtype":"U8","dtype":"I8"}}'), "'dtype' stands twice"),
    ("duplicate metadata", framed(b'{"__metadata__":{"k":"1","k":"2"}}'), "'k' stands twice"),
    ("duplicate by escape", framed(b'{"a":1,"\\u0061":2}'), "'a' stands twice"),
    ("bomb of arrays", framed(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    ("bomb of objects", framed(b'{"a":' * 200_000), "nested too deeply"),
    ("nested as deep as fits", framed(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"), "nothing else"),
    ("number of a million digits", framed(b'{"a":' + b"9" * 10**6 + b"}"), "1000000 digits"),
    ("half a surrogate pair", framed(b'{"\\ud800":1}'), "not valid UTF-8"),
    ("entry is no object", described({"a": [1]}), "tensor 'a': must have dtype"),
    ("no dtype", described({"a": without("dtype")}, DATA), "tensor 'a': must have dtype"),
    ("no shape", described({"a": without("shape")}, DATA), "tensor 'a': must have dtype"),
    ("no offsets", described({"a": without("data_offsets")}, DATA), "tensor 'a': must have dtype"),
    ("extra field", described({"a": entry(url="x")}, DATA), "nothing else"),
    ("dtype unknown", described({"a": entry("U9")}, DATA), "unknown dtype 'U9'"),
    ("dtype in lower case", described({"a": entry("u8")}, DATA), "unknown dtype 'u8'"),
    ("dtype no string", described({"a": entry(["U8"])}, DATA), "dtype must be a string"),
    ("dtype null", described({"a": entry(None)}, DATA), "dtype must be a string"),
    ("shape no list", described({"a": entry() | {"shape": 4}}, DATA), "shape must be a list"),
    ("shape of bool", described({"a": entry("U8", (True,), (0, 1))}, b"\0"), "not \\[True\\]"),
    ("shape of float", described({"a": entry("U8", (4.0,))}, DATA), "not \\[4.0\\]"),
    ("shape of text", described({"a": entry("U8", ("4",))}, DATA), "not \\['4'\\]"),
    ("shape negative", described({"a": entry("U8", (-2, -2))}, DATA), "negative dimension -2"),
    ("shape huge", described({"a": entry("U8", (BIG, BIG))}, DATA), "more than the"),
    ("shape wraps 64 bits to 4", described({"a": entry("U8", (2**62 + 1, 4))}, DATA), "more than"),
    ("shape huge beside 0", described({"a": entry("U8", (0, BIG, BIG), (0, 0))}), "more than the"),
    ("half a byte", described({"a": entry("F4", (7,))}, DATA), "7 elements of 4 bits"),
    ("offsets of bool", described({"a": entry("U8", (1,), (False, True))}, b"\0"), "two integers"),
    ("offsets of float", described({"a": entry("U8", (4,), (0.0, 4.0))}, DATA), "two integers"),
    ("one offset", described({"a": entry("U8", (4,), (0,))}, DATA), "two integers"),
    ("three offsets", described({"a": entry("U8", (4,), (0, 4, 4))}, DATA), "two integers"),
    (
        "offsets reversed",
        described({"a": entry("U8", (4,), (4, 0))}, DATA),
        "\\[4, 0\\] do not ris",
    ),
    ("offset negative", described({"a": entry("U8", (4,), (-4, 0))}, DATA), "\\[-4, 0\\] do not r"),
    ("larger than its shape", described({"a": entry("U8", (3,))}, DATA), "needs 3 .* hold 4"),
    ("smaller than its shape", described({"a": entry("U8", (5,))}, DATA), "needs 5 .* hold 4"),
    ("other dtype's size", described({"a": entry("F32")}, DATA), "needs 16 bytes"),
    ("beyond the data", described({"a": entry("U8", (9,), (0, 9))}, DATA), "is truncated"),
    ("hole before", described({"a": entry(offsets=(2, 6))}, b"\0" * 6), "leaves a hole"),
    ("hole at 2**70", described({"a": entry(offsets=(2**70, 2**70 + 4))}, DATA), "leaves a hole"),
    (
        "hole between",
        described({"a": entry(), "b": entry(offsets=(5, 9))}, b"\0" * 9),
        "'b' leaves a hole",
    ),
    (
        "overlap",
        described({"a": entry(), "b": entry(offsets=(3, 7))}, b"\0" * 7),
        "'b' overlaps the tensor before it",
    ),
    ("same range twice", described({"a": entry(), "b": entry()}, DATA), "'b' overlaps"),
    (
        "empty tensor inside another",
        described({"a": entry(), "b": entry("U8", (0,), (2, 2))}, DATA),
        "'b' overlaps",
    ),
    ("empty tensor after the data", described({"a": entry("U8", (0,), (4, 4))}, DATA), "a hole"),
    ("trailing data", described({"a": entry()}, DATA + b"!"), "has trailing bytes"),
    ("data of nothing", described({}, b"!"), "has trailing bytes"),
    ("metadata no object", described({"__metadata__": ["pt"]}), "__metadata__ must map"),
    ("metadata null", described({"__metadata__": None}), "__metadata__ must map"),
    ("metadata of int", described({"__metadata__": {"k": 1}}), "__metadata__ 'k' must be a str"),
    ("metadata nested", described({"__metadata__": {"k": {}}}), "__metadata__ 'k' must be a str"),
]


@pytest.mark.parametrize(
    ("content", "message"), [row[1:] for row in ATTACKS], ids=[row[0] for row in ATTACKS]
)
def test_refused(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_header(path)
    assert str(refusal.value).startswith(str(path))
    assert len(str(refusal.value)) < 1000


def test_the_table_damages_a_file_that_is_otherwise_accepted(tmp_path):
    path = tmp_path / "good.safetensors"
    path.write_bytes(described({"a": entry(), "__metadata__": {"k": "v"}}, DATA))
    assert list(read_header(path).tensors) == ["a"]


@pytest.mark.parametrize(("nbytes", "fault"), [(-1, "is truncated"), (1, "has trailing bytes")])
def test_wrong_length_gives_both_numbers(tmp_path, nbytes, fault):
    blob = described({"a": entry("U8", (400,), (0, 400))}, b"\0" * 400)
    path = tmp_path / "cut.safetensors"
    path.write_bytes(blob)
    os.truncate(path, len(blob) + nbytes)
    with pytest.raises(CheckpointError, match=f"{fault}: {len(blob) + nbytes} bytes.* {len(blob)}"):
        read_header(path)


def test_messages_escape_what_a_terminal_would_obey():
    blob = described({"\x1b[2J\r": entry("?")}, DATA)
    with pytest.raises(CheckpointError) as refusal:
        parse_header(blob, Path("f"), len(blob))
    assert "\\x1b[2J\\r" in str(refusal.value)
    assert "\x1b" not in str(refusal.value)


def test_a_sparse_file_of_a_terabyte_allocates_nothing(tmp_path):
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(struct.pack("<Q", 2**39))
    os.truncate(path, 2**40)
    with pytest.raises(CheckpointError, match="header of 549755813888 bytes; at most"):
        read_header(path)


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "device"])
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    said = {"missing": "No such file", "fifo": "a FIFO", "device": "a character device"}
    with pytest.raises(CheckpointError, match=said.get(kind, "a directory")):
        read_header(path)


VALID = described(
    {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", (2, 3), (0, 24)),
        "empty": entry("I64", (0, 2), (24, 24)),
        "b": entry("BF16", (4,), (24, 32)),
        "c": entry("F4", (3, 2), (32, 35)),
    },
    bytes(range(35)),
)


def check_verdict(blob):
    """Refused with our own error, or exactly the data described, as the library reads it."""
    try:
        header = parse_header(blob, Path("f"), len(blob))
    except CheckpointError:
        return
    covered = [0] * (len(blob) - header.data_start)
    for ref in header.tensors.values():
        for i in range(ref.offset, ref.offset + ref.nbytes):
            covered[i - header.data_start] += 1
    assert set(covered) <= {1}
    library = {name: (info["dtype"], tuple(info["shape"])) for name, info in deserialize(blob)}
    assert library == {ref.name: (ref.dtype, ref.shape) for ref in header.tensors.values()}


changes = st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4)


@settings(deadline=None)
@given(changes, st.integers(0, len(VALID)), st.binary(max_size=3))
def test_random_bytes(edits, length, tail):
    blob = bytearray(VALID)
    for position, byte in edits:
        blob[position] = byte
    check_verdict(bytes(blob))
    check_verdict(bytes(blob[:length]) + tail)
    check_verdict(bytes(blob) + tail)


digits = st.sampled_from(b'0123456789-,[]{}": .eE')


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(8, len(VALID) - 36), digits), min_size=1, max_size=3))
def test_random_json_characters(edits):
    blob = bytearray(VALID)
    for position, byte in edits:
        blob[position] = byte
    check_verdict(bytes(blob))


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-40, 40),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, -(2**63), 1.0, "F32", "U8"]),
    st.text(max_size=3),
    st.lists(st.integers(-2, 40), max_size=4),
)
places = st.tuples(
    st.sampled_from(["a", "empty", "b", "c", "__metadata__"]),
    st.sampled_from(["dtype", "shape", "data_offsets", "format", ""]),
    st.integers(0, 2),
)


@settings(deadline=None)
@given(st.lists(st.tuples(places, odd), min_size=1, max_size=3), st.integers(-9, 9))
def test_random_values(edits, change):
    header = json.loads(VALID[8:-35])
    for (name, field, position), value in edits:
        target = header[name]
        if not field or not isinstance(target, dict):
            header[name] = value
        elif isinstance(target.get(field), list) and position < len(target[field]):
            target[field][position] = value
        else:
            target[field] = value
    check_verdict(described(header, bytes(max(0, 35 + change))))
