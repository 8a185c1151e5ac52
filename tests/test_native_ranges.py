"""Byte ranges read, written and copied: against plain Python on the same files."""

from __future__ import annotations

import errno
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reap_stream import _native

FILE_NBYTES = 5000
PIECE_NBYTES = 8 << 20  # where shards.cpp cuts a range


def pattern(nbytes, seed):
    return np.random.default_rng(seed).bytes(nbytes)


@pytest.fixture
def shards(tmp_path):
    """Three files of known bytes: their paths, and the bytes."""
    contents = [pattern(FILE_NBYTES + i, i) for i in range(3)]
    paths = [str(tmp_path / f"shard-{i}") for i in range(3)]
    for path, content in zip(paths, contents, strict=True):
        Path(path).write_bytes(content)
    return paths, contents


ranges_of_shards = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, FILE_NBYTES), st.integers(0, 900)).map(
        lambda r: (r[0], r[1], min(r[2], FILE_NBYTES - r[1]))
    ),
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(ranges=ranges_of_shards, threads=st.integers(0, 4))
def test_reads_any_layout(tmp_path_factory, ranges, threads):
    directory = tmp_path_factory.mktemp("read")
    contents = [pattern(FILE_NBYTES, i) for i in range(3)]
    paths = [directory / str(i) for i in range(3)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    outs = [bytearray(nbytes) for _, _, nbytes in ranges]
    total = _native.read_ranges(paths, ranges, outs, threads=threads)
    assert total == sum(nbytes for _, _, nbytes in ranges)
    for (file, offset, nbytes), out in zip(ranges, outs, strict=True):
        assert out == contents[file][offset : offset + nbytes]


def cut(nbytes, points):
    """Consecutive (offset, nbytes) between sorted points: ranges that cannot overlap."""
    edges = [0, *sorted(points), nbytes]
    return [(begin, end - begin) for begin, end in pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(
    points=st.lists(st.integers(0, FILE_NBYTES), max_size=8),
    chosen=st.lists(st.booleans(), min_size=9, max_size=9),
    order=st.randoms(use_true_random=False),
    threads=st.integers(0, 4),
)
def test_writes_any_layout_and_nothing_else(tmp_path_factory, points, chosen, order, threads):
    path = tmp_path_factory.mktemp("write") / "file"
    expected = bytearray(pattern(FILE_NBYTES, 7))
    path.write_bytes(expected)
    pieces = [piece for piece, take in zip(cut(FILE_NBYTES, points), chosen, strict=False) if take]
    order.shuffle(pieces)
    srcs = [pattern(nbytes, i) for i, (_, nbytes) in enumerate(pieces)]
    for (offset, nbytes), src in zip(pieces, srcs, strict=True):
        expected[offset : offset + nbytes] = src
    ranges = [(0, offset, nbytes) for offset, nbytes in pieces]
    assert _native.write_ranges([path], ranges, srcs, threads=threads) == sum(map(len, srcs))
    assert path.read_bytes() == expected


@settings(max_examples=60, deadline=None)
@given(
    points=st.lists(st.integers(0, FILE_NBYTES), max_size=8),
    starts=st.lists(st.integers(0, 1000), min_size=9, max_size=9),
    threads=st.integers(0, 4),
)
def test_copies_any_layout_and_nothing_else(tmp_path_factory, points, starts, threads):
    directory = tmp_path_factory.mktemp("copy")
    source, target = directory / "source", directory / "target"
    content = pattern(2 * FILE_NBYTES, 8)
    source.write_bytes(content)
    expected = bytearray(FILE_NBYTES)
    target.write_bytes(expected)
    ranges = []
    for (offset, nbytes), start in zip(cut(FILE_NBYTES, points), starts, strict=False):
        ranges.append((0, start, 0, offset, nbytes))
        expected[offset : offset + nbytes] = content[start : start + nbytes]
    assert _native.copy_ranges([source], [target], ranges, threads=threads) == FILE_NBYTES
    assert target.read_bytes() == expected


def test_large_ranges_are_cut_and_joined(tmp_path):
    content = pattern(2 * PIECE_NBYTES + 12345, 9)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(content)
    offset, nbytes = 777, len(content) - 777
    out = bytearray(nbytes)
    assert _native.read_ranges([source], [(0, offset, nbytes)], [out], threads=3) == nbytes
    assert out == content[offset:]
    target.write_bytes(b"")
    assert _native.write_ranges([target], [(0, 5, nbytes)], [out], threads=3) == nbytes
    assert target.read_bytes() == b"\0" * 5 + content[offset:]
    assert _native.copy_ranges([source], [target], [(0, 0, 0, 9, nbytes)], threads=3) == nbytes
    assert target.read_bytes()[9:] == content[:nbytes]


def test_no_ranges_open_no_file():
    assert _native.read_ranges(["/nowhere"], [], []) == 0
    assert _native.write_ranges([], [], []) == 0
    assert _native.copy_ranges(["/nowhere"], ["/nowhere"], []) == 0


def test_only_named_files_are_opened(shards, tmp_path):
    paths, contents = shards
    out = bytearray(10)
    _native.read_ranges([tmp_path / "missing", paths[1]], [(1, 0, 10)], [out])
    assert out == contents[1][:10]


@pytest.mark.parametrize(
    ("offset", "nbytes", "got"), [(4990, 11, 10), (5000, 1, 0), (9999, 5, 0), (0, 5001, 5000)]
)
def test_end_of_file_names_the_file_and_the_numbers(shards, offset, nbytes, got):
    paths, _ = shards
    ranges = [(0, 0, 4), (0, offset, nbytes)]
    first = bytearray(4)
    message = rf"shard-0: wanted {nbytes} bytes at offset {offset}, got {got} before the end"
    with pytest.raises(EOFError, match=message):
        _native.read_ranges(paths, ranges, [first, bytearray(nbytes)])
    assert first == bytes(4), "the end of the file was known before anything was read"
    with pytest.raises(EOFError, match=message):
        _native.copy_ranges(paths, [paths[1]], [(0, offset, 0, 0, nbytes)])


def read(path):
    _native.read_ranges([path], [(0, 0, 1)], [bytearray(1)])


def write(path):
    _native.write_ranges([path], [(0, 0, 1)], [b"x"])


def copy_from(path):
    target = Path(path).parent / "copy-target"
    target.write_bytes(b"xx")
    _native.copy_ranges([path], [target], [(0, 0, 0, 0, 1)])


@pytest.mark.parametrize("call", [read, write, copy_from])
def test_a_missing_file_is_named_and_not_created(tmp_path, call):
    path = tmp_path / "missing-é"
    with pytest.raises(FileNotFoundError) as caught:
        call(path)
    assert caught.value.filename == str(path)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.strerror == os.strerror(errno.ENOENT)
    assert not path.exists()


@pytest.mark.parametrize("call", [read, write])
def test_a_directory_is_no_file(tmp_path, call):
    with pytest.raises(IsADirectoryError) as caught:
        call(tmp_path)
    assert caught.value.filename == str(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_file_is_not_written(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    path.chmod(0o444)
    with pytest.raises(PermissionError):
        write(path)


def test_a_file_name_that_is_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff"
    Path(os.fsdecode(path)).write_bytes(b"abc")
    out = bytearray(3)
    _native.read_ranges([path], [(0, 0, 3)], [out])
    assert out == b"abc"
    with pytest.raises(FileNotFoundError) as caught:
        read(path + b"\xfe")
    assert caught.value.filename == os.fsdecode(path + b"\xfe")


def test_overlapping_ranges_are_not_written(shards, tmp_path):
    paths, contents = shards
    os.link(paths[0], tmp_path / "link")  # another name of the same file
    link = str(tmp_path / "link")
    files = [*paths, link]
    with pytest.raises(ValueError, match=r"10 bytes to be written at offset 5 overlaps"):
        _native.write_ranges(files, [(0, 0, 6), (3, 5, 10)], [b"x" * 6, b"y" * 10])
    for ranges in (
        [(0, 0, 0, 9, 10)],  # target begins inside the source
        [(0, 9, 0, 0, 10)],
        [(1, 0, 0, 0, 10), (2, 0, 0, 9, 10)],  # two targets
        [(1, 0, 0, 0, 10), (0, 9, 1, 5, 1)],  # the source of one is the target of another
    ):
        with pytest.raises(ValueError, match="overlaps a range of the same file"):
            _native.copy_ranges(paths, [link, paths[2]], ranges)
    assert [Path(path).read_bytes() for path in paths] == contents


def test_a_file_is_copied_within_itself_where_nothing_overlaps(shards):
    paths, contents = shards
    _native.copy_ranges(paths, paths, [(0, 0, 0, 100, 100), (0, 0, 0, 200, 100)])
    start = contents[0][:100]
    assert Path(paths[0]).read_bytes() == start * 3 + contents[0][300:]


def test_overlapping_buffers_are_not_filled(shards):
    paths, _ = shards
    whole = bytearray(10)
    view = memoryview(whole)
    with pytest.raises(ValueError, match=r"overlap in memory: one of 6 bytes, one of 5 bytes"):
        _native.read_ranges(paths, [(0, 0, 6), (1, 0, 5)], [view[:6], view[5:]])
    assert whole == bytes(10)
