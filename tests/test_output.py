from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reap_stream.checkpoint import output, transfers
from reap_stream.checkpoint.layout import layer_tensors, plan_layout
from reap_stream.checkpoint.output import OutputWriter, check_free_space
from reap_stream.errors import OutputError, ReadError, ResumeError
from tests.pruning_source import assert_same, load_shards, make_source, pruned_arrays

KEEP = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source") / "model")


def writer_for(source, directory, max_shard_nbytes=300, keep=KEEP):
    tensors = source.open().tensors
    plan = plan_layout(tensors, source.roles, source.num_experts, keep, max_shard_nbytes)
    return OutputWriter(directory, plan, tensors, source.roles)


def from_disk(ref):
    return None


def write_all(writer, kept, resident=from_disk):
    return [writer.write_layer(layer, kept, resident) for layer in layer_tensors(writer.plan)]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    keep=st.integers(1, 6),
    max_shard_nbytes=st.integers(1, 2000),
    seed=st.integers(0, 1000),
    memory=st.sampled_from(["none", "all", "some"]),
)
def test_writes_what_numpy_slicing_gives(
    source, tmp_path_factory, keep, max_shard_nbytes, seed, memory
):
    directory = tmp_path_factory.mktemp("out")
    writer = writer_for(source, directory, max_shard_nbytes, keep)
    kept = source.choose(keep, seed)
    rng = np.random.default_rng(seed)

    def resident(ref):
        if memory == "none" or (memory == "some" and rng.random() < 0.5):
            return None
        # As a read-only array of some other type and shape: any contiguous buffer will do.
        array = source.arrays[ref.name].copy()
        array.setflags(write=False)
        return array

    writer.allocate()
    counts = write_all(writer, kept, resident)
    writer.sync()
    assert_same(load_shards(directory), pruned_arrays(source.arrays, source.roles, kept))
    assert sum(count.nbytes for count in counts) == writer.plan.total_size
    copied = sum(count.copied_nbytes for count in counts)
    assert {"none": copied == writer.plan.total_size, "all": copied == 0, "some": True}[memory]


def test_small_batches_write_the_same(source, tmp_path, monkeypatch):
    monkeypatch.setattr(transfers, "_BATCH_NBYTES", 7)
    monkeypatch.setattr(transfers, "_BATCH_RANGES", 2)
    kept = source.choose(KEEP)
    writer = writer_for(source, tmp_path)
    writer.allocate()
    write_all(writer, kept)
    assert_same(load_shards(tmp_path), pruned_arrays(source.arrays, source.roles, kept))


def test_layers_in_any_order_twice_and_after_reopening(source, tmp_path):
    kept, other = source.choose(KEEP, 1), source.choose(KEEP, 2)
    assert kept != other
    first = writer_for(source, tmp_path)
    first.allocate()
    first.write_layer(2, other, from_disk)
    first.write_layer(1, kept, from_disk)
    second = writer_for(source, tmp_path)
    second.reopen()
    for layer in (3, None, 2):
        second.write_layer(layer, kept, from_disk)
    second.sync()
    assert_same(load_shards(tmp_path), pruned_arrays(source.arrays, source.roles, kept))


def test_tensors_can_be_written_one_by_one(source, tmp_path):
    kept = source.choose(KEEP)
    writer = writer_for(source, tmp_path)
    writer.allocate()
    for out in writer.plan.tensors.values():
        assert writer.write([out], kept, from_disk).nbytes == out.nbytes
    assert_same(load_shards(tmp_path), pruned_arrays(source.arrays, source.roles, kept))


def test_allocated_shards_have_their_final_length_and_valid_headers(source, tmp_path):
    writer = writer_for(source, tmp_path / "deep" / "out")
    writer.allocate()
    loaded = load_shards(tmp_path / "deep" / "out")
    assert {name: array.shape for name, array in loaded.items()} == {
        name: out.shape for name, out in writer.plan.tensors.items()
    }


def test_allocating_anew_forgets_what_was_there(source, tmp_path):
    writer = writer_for(source, tmp_path)
    writer.allocate()
    write_all(writer, source.choose(KEEP))
    writer.allocate()
    assert not any(array.any() for array in load_shards(tmp_path).values())


def cut(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def flip_in_header(path):
    raw = bytearray(path.read_bytes())
    raw[12] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: path.unlink(), "missing"),
        (cut, r"\d+ bytes, the plan says \d+"),
        (flip_in_header, "header is not the planned one"),
    ],
)
def test_reopening_refuses_other_shards(source, tmp_path, damage, match):
    writer = writer_for(source, tmp_path)
    writer.allocate()
    damage(tmp_path / writer.plan.shards[-1].filename)
    with pytest.raises(ResumeError, match=f"{writer.plan.shards[-1].filename}: .*{match}"):
        writer_for(source, tmp_path).reopen()


@pytest.mark.parametrize("kept", [{}, {1: [0, 1]}, {1: [2, 1, 0]}, {1: [3, 4, 6]}])
def test_refuses_a_choice_that_does_not_fit(source, tmp_path, kept):
    writer = writer_for(source, tmp_path)
    writer.allocate()
    before = load_shards(tmp_path)
    with pytest.raises(OutputError, match="layer 1: "):
        writer.write_layer(1, kept, from_disk)
    assert_same(load_shards(tmp_path), before)


def test_refuses_a_buffer_of_the_wrong_length(source, tmp_path):
    writer = writer_for(source, tmp_path)
    writer.allocate()
    with pytest.raises(OutputError, match=r"'model\.\S+' has \d+ bytes, the buffer .* hold it 1$"):
        writer.write_layer(None, {}, lambda _: b"x")


def test_a_source_that_became_shorter_is_a_read_error(tmp_path):
    source = make_source(tmp_path / "source")
    writer = writer_for(source, tmp_path / "out")
    writer.allocate()
    shard = tmp_path / "source" / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(ReadError, match="00002-of-00002"):
        write_all(writer, source.choose(KEEP))


def test_a_source_that_is_gone_is_a_read_error(tmp_path):
    source = make_source(tmp_path / "source")
    writer = writer_for(source, tmp_path / "out")
    writer.allocate()
    (tmp_path / "source" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ReadError, match=r"00002-of-00002\.safetensors: could not be read"):
        write_all(writer, source.choose(KEEP))


def test_an_output_that_is_gone_is_an_output_error(source, tmp_path):
    writer = writer_for(source, tmp_path)
    writer.allocate()
    (tmp_path / writer.plan.shards[0].filename).unlink()
    with pytest.raises(OutputError, match="00001"):
        write_all(writer, source.choose(KEEP))


def test_too_little_room_is_found_before_anything_is_written(source, tmp_path, monkeypatch):
    writer = writer_for(source, tmp_path / "out")
    usage = SimpleNamespace(free=writer.plan.nbytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    needed = writer.plan.nbytes
    with pytest.raises(OutputError, match=f"{needed - 1} bytes free, .* needs {needed}"):
        writer.allocate()
    assert list((tmp_path / "out").iterdir()) == []
    check_free_space(tmp_path / "not" / "there" / "yet", needed - 1)
    with pytest.raises(OutputError, match=str(2 * needed)):
        check_free_space(tmp_path, 2 * needed)


def test_a_sync_leaves_what_is_written_meanwhile_to_the_next(source, tmp_path, monkeypatch):
    kept = source.choose(KEEP)
    writer = writer_for(source, tmp_path, max_shard_nbytes=10**9)
    writer.allocate()
    synced = []
    inside, go_on = threading.Event(), threading.Event()

    def slow(path):
        synced.append(path)
        inside.set()
        assert go_on.wait(10)

    monkeypatch.setattr(output._native, "sync_file", slow)
    thread = threading.Thread(target=writer.sync)
    thread.start()
    assert inside.wait(10)
    writer.write_layer(1, kept, from_disk)
    go_on.set()
    thread.join()
    writer.sync()
    writer.sync()
    assert len(synced) == 2


def test_bytes_lost_once_are_not_reported_safe_later(source, tmp_path, monkeypatch):
    def lose(path):
        raise OSError(5, "Input/output error", path)

    writer = writer_for(source, tmp_path)
    writer.allocate()
    with monkeypatch.context() as patch:
        patch.setattr(output._native, "sync_file", lose)
        with pytest.raises(OutputError, match=r"00001-of.*Input/output error"):
            writer.sync()
    with pytest.raises(OutputError, match=r"00001-of.*Input/output error"):
        writer.sync()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, where the machine lets us mount one."""
    point = tmp_path / "disk"
    point.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(point)]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(mounting, capture_output=True, check=False).returncode == 0:
            yield point
            subprocess.run(["umount", str(point)], check=True)
            return
    pytest.skip("mounting a file system is not permitted here")


def test_a_disk_that_fills_while_room_is_taken(source, small_disk, monkeypatch):
    # The check passes, as it does when another process takes the room a moment later.
    monkeypatch.setattr(output, "check_free_space", lambda *_: None)
    (small_disk / "other").write_bytes(bytes(60 * 1024))
    writer = writer_for(source, small_disk / "out", max_shard_nbytes=5000)
    with pytest.raises(
        OutputError, match=r"disk is full.*\d+ bytes are needed, \d+ bytes are free"
    ):
        writer.allocate()
