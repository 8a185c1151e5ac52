"""Headers against the safetensors library: what it writes we read, what we write it reads."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

from reap_stream.checkpoint.dtypes import DTYPE_BITS, tensor_nbytes
from reap_stream.checkpoint.header import parse_header, read_header, render_header
from reap_stream.errors import CheckpointError

FILE = Path("model.safetensors")

# The empty name and control characters are legal; halves of surrogate pairs are not text.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = texts.filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
numpy_dtypes = st.sampled_from(
    ["bool", "u1", "i1", "i2", "u2", "f2", "i4", "u4", "f4", "f8", "i8", "u8", "c8"]
)
arrays = st.dictionaries(names, st.builds(np.zeros, shapes, numpy_dtypes), max_size=8)


def library_view(blob):
    return {name: (info["dtype"], tuple(info["shape"])) for name, info in deserialize(blob)}


def our_view(header):
    return {ref.name: (ref.dtype, ref.shape) for ref in header.tensors.values()}


@settings(deadline=None)
@given(arrays, st.dictionaries(texts, texts, max_size=3))
def test_parse_agrees_with_the_library(tensors, metadata):
    # Of no tensors and an empty metadata dict safetensors 0.8.0 makes JSON that it cannot read.
    blob = save(tensors, metadata=metadata or None)
    header = parse_header(blob, FILE, len(blob))
    assert our_view(header) == library_view(blob)
    assert header.metadata == metadata


@settings(deadline=None)
@given(st.lists(st.tuples(names, st.integers(0, 20)), max_size=6, unique_by=lambda item: item[0]))
def test_offsets_lead_to_each_tensors_own_bytes(items):
    tensors = {name: np.full(n, i, np.uint8) for i, (name, n) in enumerate(items)}
    blob = save(tensors)
    header = parse_header(blob, FILE, len(blob))
    for name, array in tensors.items():
        ref = header.tensors[name]
        assert ref.file == FILE
        assert blob[ref.offset : ref.offset + ref.nbytes] == array.tobytes()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(names, st.sampled_from(sorted(DTYPE_BITS)), shapes),
        max_size=8,
        unique_by=lambda item: item[0],
    ),
    st.dictionaries(texts, texts, max_size=3),
)
def test_render_is_read_by_the_library(items, metadata):
    entries, end = [], 0
    for name, dtype, shape in items:
        # A last dimension of 4 fills whole bytes for every sub-byte dtype.
        whole = (*shape, 4)
        begin, end = end, end + math.prod(whole) * DTYPE_BITS[dtype] // 8
        entries.append((name, dtype, whole, begin, end))
    raw = render_header(entries, metadata)
    blob = raw + bytes(end)
    assert len(raw) % 8 == 0
    assert library_view(blob) == {name: (dtype, shape) for name, dtype, shape, *_ in entries}
    parsed = parse_header(raw, FILE, len(blob))
    assert [(ref.name, ref.offset) for ref in parsed.tensors.values()] == [
        (name, len(raw) + begin)
        for name, *_, begin, end in sorted(entries, key=lambda entry: entry[3:])
    ]
    assert parsed.metadata == metadata


def test_read_header_reads_a_file_that_safe_open_reads(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 7), "i8")}
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    header = read_header(path)
    with safe_open(path, "numpy") as file:
        assert set(header.tensors) == set(file.keys())
        assert header.metadata == file.metadata()
        for name, ref in header.tensors.items():
            lazy = file.get_slice(name)
            assert (ref.dtype, list(ref.shape)) == (lazy.get_dtype(), lazy.get_shape())
    assert header.tensors["empty"].nbytes == 0


def test_bytes_behind_the_header_are_ignored_by_parse():
    raw = render_header([("a", "U8", (3,), 0, 3)], {})
    assert parse_header(raw + b"xyz", FILE, len(raw) + 3) == parse_header(raw, FILE, len(raw) + 3)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_has_the_librarys_width(dtype):
    nbytes = tensor_nbytes(dtype, (8, 3))

    def blob(data_nbytes):
        entry = {"dtype": dtype, "shape": [8, 3], "data_offsets": [0, data_nbytes]}
        text = json.dumps({"a": entry}).encode()
        return struct.pack("<Q", len(text)) + text + bytes(data_nbytes)

    assert library_view(blob(nbytes)) == {"a": (dtype, (8, 3))}
    with pytest.raises(SafetensorError):
        deserialize(blob(nbytes + 1))


def test_no_dtype_of_the_library_is_missing():
    text = b'{"a":{"dtype":"?","shape":[],"data_offsets":[0,1]}}'
    with pytest.raises(SafetensorError) as refusal:
        deserialize(struct.pack("<Q", len(text)) + text + b"\0")
    listed = str(refusal.value).partition("expected one of")[2]
    assert {part for part in listed.split("`")[1::2] if part != ", "} == set(DTYPE_BITS)


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("F32", (), 4),
        ("BF16", (2, 3), 12),
        ("F4", (3, 2), 3),
        ("F6_E2M3", (4,), 3),
        ("F32", (0, 5), 0),
        ("U8", (2**63 - 1,), 2**63 - 1),
    ],
)
def test_tensor_nbytes(dtype, shape, nbytes):
    assert tensor_nbytes(dtype, shape) == nbytes


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        ("I4", (2,), "unknown dtype 'I4'"),
        ("F32", (2, -1), "negative dimension -1"),
        ("F4", (3,), "3 elements of 4 bits end inside a byte"),
        ("F6_E3M2", (2,), "2 elements of 6 bits end inside a byte"),
        ("U8", (2**63,), "more than the 9223372036854775807 bytes"),
        ("U8", (2**32, 2**32), "more than the"),
        ("U8", (0, 2**40, 2**40), "more than the"),
        ("U8", (2,) * 10_000_000, "more than the"),
    ],
)
def test_tensor_nbytes_refuses(dtype, shape, message):
    with pytest.raises(CheckpointError, match=message):
        tensor_nbytes(dtype, shape)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("__metadata__", "U8", (1,), 0, 1)], "reserved or used twice"),
        ([("a", "U8", (1,), 0, 1), ("a", "U8", (1,), 1, 2)], "reserved or used twice"),
        ([("a", "U8", (1,), 0, 2)], "needs 1 bytes"),
        ([("a", "U8", (1,), 0, 1), ("b", "U8", (1,), 2, 3)], "leaves a hole"),
        ([("a", "U8", (2,), 0, 2), ("b", "U8", (1,), 1, 2)], "overlaps"),
        ([("\ud800", "U8", (1,), 0, 1)], "cannot be written"),
    ],
)
def test_render_refuses_what_would_not_be_read(entries, message):
    with pytest.raises(CheckpointError, match=message):
        render_header(entries, {})


def test_render_keeps_reserved_name_apart_from_given_metadata():
    with pytest.raises(CheckpointError, match="reserved"):
        render_header([("__metadata__", "U8", (1,), 0, 1)], {"format": "pt"})
