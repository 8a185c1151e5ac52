"""Reads of tensor ranges: the right bytes, the right count, and errors that name the tensor."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from reap_stream import _native
from reap_stream.checkpoint.header import read_header
from reap_stream.checkpoint.reader import Reader, coalesce
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.errors import ReadError

TENSORS = {
    "a": np.arange(1000, dtype="f4").reshape(10, 100),
    "b": np.arange(77, dtype="u1"),
    "empty": np.zeros((0, 3), "f2"),
}


@pytest.fixture(scope="module")
def refs(tmp_path_factory):
    """The same tensors in two shards, as {(shard, name): ref}."""
    directory = tmp_path_factory.mktemp("shards")
    found = {}
    for shard in ("one.safetensors", "two.safetensors"):
        save_file(TENSORS, directory / shard)
        header = read_header(directory / shard)
        found |= {(shard[:3], name): ref for name, ref in header.tensors.items()}
    return found


@pytest.fixture
def reader():
    with Reader(threads=2) as opened:
        yield opened


@pytest.mark.parametrize("name", TENSORS)
def test_read(reader, refs, name):
    out = reader.read(refs["one", name])
    assert out.dtype == np.uint8
    assert out.shape == (TENSORS[name].nbytes,)
    assert out.tobytes() == TENSORS[name].tobytes()
    assert reader.bytes_read == TENSORS[name].nbytes


ranges = st.tuples(
    st.sampled_from(["one", "two"]),
    st.sampled_from(sorted(TENSORS)),
    st.floats(0, 1),
    st.floats(0, 1),
)


@settings(deadline=None)
@given(picks=st.lists(ranges, max_size=8))
def test_batches_of_ranges(refs, picks):
    requests, expected = [], []
    for shard, name, low, high in picks:
        raw = TENSORS[name].tobytes()
        start, stop = sorted((int(low * len(raw)), int(high * len(raw))))
        requests.append((refs[shard, name], start, stop - start, bytearray(stop - start)))
        expected.append(raw[start:stop])
    with Reader() as reader:
        reader.read_into(requests)
        assert [bytes(out) for *_, out in requests] == expected
        assert reader.bytes_read == sum(map(len, expected))


def test_any_writable_buffer_will_do(reader, refs):
    ref, expected = refs["one", "a"], TENSORS["a"]
    array = np.empty_like(expected)
    arena = bytearray(ref.nbytes + 8)
    reader.read_into(
        [(ref, 0, ref.nbytes, array), (ref, 0, ref.nbytes, memoryview(arena)[4:-4])],
    )
    np.testing.assert_array_equal(array, expected)
    assert arena == bytes(4) + expected.tobytes() + bytes(4)


@pytest.mark.parametrize(
    ("start", "nbytes", "out", "message"),
    [
        (-1, 4, bytearray(4), "'b': 4 bytes from byte -1 were asked for, it has 77"),
        (0, 78, bytearray(78), "'b': 78 bytes from byte 0 were asked for, it has 77"),
        (77, 1, bytearray(1), "'b': 1 bytes from byte 77"),
        (0, -1, bytearray(0), "'b': -1 bytes"),
        (0, 2**64, bytearray(0), "'b': 18446744073709551616 bytes"),
        (0, 4, bytearray(5), "this one has 5 bytes"),
        (0, 4, bytearray(3), "this one has 3 bytes"),
        (0, 4, bytes(4), "readonly=True"),
        (0, 4, np.zeros(8, "u1")[::2], "contiguous=False"),
    ],
)
def test_requests_that_do_not_fit_are_refused_before_any_read(
    reader, refs, start, nbytes, out, message
):
    first = bytearray(77)
    with pytest.raises(ReadError, match=message):
        reader.read_into([(refs["one", "b"], 0, 77, first), (refs["one", "b"], start, nbytes, out)])
    assert first == bytes(77)
    assert reader.bytes_read == 0


def test_a_file_that_shrank_is_named_with_its_tensor_and_both_numbers(reader, tmp_path):
    path = tmp_path / "shard.safetensors"
    save_file(TENSORS, path)
    tensors = read_header(path).tensors
    last = max(tensors.values(), key=lambda ref: ref.offset + ref.nbytes)
    end = last.offset + last.nbytes
    os.truncate(path, end - 1)
    requests = [(ref, 0, ref.nbytes, bytearray(ref.nbytes)) for ref in tensors.values()]
    with pytest.raises(
        ReadError, match=f"'{last.name}' ends at byte {end}.* has {end - 1}"
    ) as caught:
        reader.read_into(requests)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value.__cause__, EOFError)
    assert reader.bytes_read == 0


def test_a_missing_file_is_named_with_its_tensor(reader, refs, tmp_path):
    gone = TensorRef("gone.weight", tmp_path / "gone.safetensors", "U8", (4,), 16, 4)
    with pytest.raises(
        ReadError, match=r"gone\.safetensors: tensor 'gone\.weight'.*byte 16.*No such"
    ):
        reader.read_into([(refs["one", "b"], 0, 77, bytearray(77)), (gone, 0, 4, bytearray(4))])


def test_a_directory_in_place_of_a_shard(reader, tmp_path):
    ref = TensorRef("w", tmp_path, "U8", (4,), 0, 4)
    with pytest.raises(ReadError, match="tensor 'w'"):
        reader.read(ref)


def test_the_count_holds_with_many_threads(reader, refs):
    ref = refs["one", "b"]
    with ThreadPoolExecutor(8) as pool:
        arrays = list(pool.map(lambda _: reader.read(ref), range(200)))
    assert {array.tobytes() for array in arrays} == {TENSORS["b"].tobytes()}
    assert reader.bytes_read == 200 * ref.nbytes


def spans(items):
    return [TensorRef(f"t{i}", file, "U8", (n,), at, n) for i, (file, at, n) in enumerate(items)]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], []),
        ([("x", 8, 0)], []),
        ([("x", 8, 4), ("x", 12, 4)], [("x", 8, 8)]),
        ([("x", 12, 4), ("x", 8, 4)], [("x", 8, 8)]),
        ([("x", 8, 4), ("x", 13, 4)], [("x", 8, 4), ("x", 13, 4)]),
        ([("x", 8, 4), ("y", 12, 4)], [("x", 8, 4), ("y", 12, 4)]),
        ([("x", 8, 4), ("x", 8, 4)], [("x", 8, 4)]),
        (
            [("x", 0, 2**27), ("x", 2**27, 1)],
            [("x", 0, 2**26), ("x", 2**26, 2**26), ("x", 2**27, 1)],
        ),
    ],
)
def test_coalesce(items, expected):
    assert coalesce(spans(items)) == expected


def test_prefetch_hints_every_byte_once_and_from_another_thread(refs, monkeypatch):
    hints, threads = [], set()

    def record(path, offset, nbytes):
        hints.append((path, offset, nbytes))
        threads.add(threading.current_thread())

    monkeypatch.setattr(_native, "prefetch", record)
    wanted = [ref for (shard, _), ref in refs.items() if shard == "one"]
    reader = Reader()
    reader.prefetch(wanted)
    reader._hints.submit(int).result(timeout=30)
    reader.close()
    begin = min(ref.offset for ref in wanted)
    assert hints == [(str(wanted[0].file), begin, sum(ref.nbytes for ref in wanted))]
    assert threads.isdisjoint({threading.current_thread()})
    assert reader.bytes_read == 0


def test_prefetch_changes_no_result_and_hides_its_failures(reader, refs, tmp_path):
    gone = TensorRef("w", tmp_path / "gone", "U8", (4,), 0, 4)
    reader.prefetch([gone, *refs.values()])
    assert reader.read(refs["two", "a"]).tobytes() == TENSORS["a"].tobytes()
    reader.close()
    reader.close()
    reader.prefetch(refs.values())


def test_close_drops_the_hints_that_wait(monkeypatch):
    started, dropped = threading.Event(), threading.Event()
    hints = []

    def slow(path, offset, nbytes):
        hints.append(offset)
        started.set()
        dropped.wait(30)

    monkeypatch.setattr(_native, "prefetch", slow)
    reader = Reader()
    reader.prefetch(spans([("x", 100 * i, 1) for i in range(50)]))
    # Last in the queue, so it is dropped after all the others.
    reader._hints.submit(int).add_done_callback(lambda _: dropped.set())
    assert started.wait(30)
    reader.close()
    assert hints == [0]
    assert not any(thread.name.startswith("reap-prefetch") for thread in threading.enumerate())
