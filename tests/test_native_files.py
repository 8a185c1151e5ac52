"""Whole files: preallocated, hinted, synced, exchanged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from reap_stream import _native


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 1_000_003])
def test_preallocate_makes_a_file_of_exactly_that_length(tmp_path, nbytes):
    path = tmp_path / "file"
    old_mask = os.umask(0o022)
    try:
        _native.preallocate(path, nbytes)
    finally:
        os.umask(old_mask)
    status = path.stat()
    assert status.st_size == nbytes
    assert status.st_mode & 0o777 == 0o644
    assert path.read_bytes() == bytes(nbytes)


@pytest.mark.parametrize("nbytes", [3, 10, 5000])
def test_preallocate_keeps_what_a_file_holds(tmp_path, nbytes):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    _native.preallocate(path, nbytes)
    assert path.read_bytes() == b"0123456789"[:nbytes].ljust(nbytes, b"\0")


def test_preallocate_reserves_blocks(tmp_path):
    path = tmp_path / "file"
    _native.preallocate(path, 1 << 20)
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, 1 << 20)
        except OSError:
            pytest.skip("this file system reserves no blocks")
    assert path.stat().st_blocks >= sparse.stat().st_blocks


def test_preallocate_beyond_any_disk_fails_and_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError, match=r"file") as caught:
        _native.preallocate(path, 2**62)
    assert caught.value.errno in {errno.ENOSPC, errno.EFBIG}
    assert caught.value.filename == str(path)
    assert not path.exists()


def test_preallocate_that_fails_keeps_a_file_that_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with pytest.raises(OSError, match=r"file"):
        _native.preallocate(path, 2**62)
    assert path.read_bytes() == b"abc"


def test_preallocate_in_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError):
        _native.preallocate(tmp_path / "missing" / "file", 1)


@pytest.mark.parametrize("hint", [_native.prefetch, _native.drop_cache])
def test_hints_change_nothing(tmp_path, hint):
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 100_000)
    for offset, nbytes in ((0, 0), (0, 300_000), (4096, 10_000), (10**9, 10)):
        assert hint(path, offset, nbytes) is None
    assert path.read_bytes() == b"abc" * 100_000
    with pytest.raises(FileNotFoundError):
        hint(tmp_path / "missing", 0, 1)


def test_sync_of_a_file_and_its_directory(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert _native.sync_file(path) is None
    assert _native.sync_directory(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        _native.sync_file(tmp_path / "missing")
    with pytest.raises(NotADirectoryError):
        _native.sync_directory(path)


def test_exchange_swaps_directories_or_says_it_cannot(tmp_path):
    left, right = tmp_path / "left", tmp_path / "right"
    left.mkdir()
    right.mkdir()
    (left / "a").write_bytes(b"a")
    (right / "b").write_bytes(b"b")
    swapped = _native.exchange(left, right)
    assert isinstance(swapped, bool)
    inside = {directory.name: {p.name for p in directory.iterdir()} for directory in (left, right)}
    expected = {"left": {"b"}, "right": {"a"}} if swapped else {"left": {"a"}, "right": {"b"}}
    assert inside == expected


def test_exchange_names_both_paths(tmp_path):
    left, right = tmp_path / "left", tmp_path / "right"
    left.mkdir()
    if not _native.exchange(left, left):
        pytest.skip("this file system exchanges nothing")
    with pytest.raises(FileNotFoundError) as caught:
        _native.exchange(left, right)
    assert (caught.value.filename, caught.value.filename2) == (str(left), str(right))


def test_trim_memory_can_be_called():
    assert _native.trim_memory() is None


def test_no_descriptor_is_left_open(tmp_path):
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc here")
    path = tmp_path / "file"
    before = len(list(descriptors.iterdir()))
    _native.preallocate(path, 10)
    _native.read_ranges([path], [(0, 0, 10)], [bytearray(10)])
    _native.copy_ranges([path], [path], [(0, 0, 0, 5, 5)])
    with pytest.raises(EOFError):
        _native.read_ranges([path], [(0, 0, 11)], [bytearray(11)])
    for _ in range(2):
        _native.sync_file(path)
        _native.prefetch(path, 0, 10)
    assert len(list(descriptors.iterdir())) == before
