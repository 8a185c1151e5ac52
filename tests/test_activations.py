from __future__ import annotations

import os
import stat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reap_stream.calibration import activations
from reap_stream.calibration.activations import HiddenStates
from reap_stream.calibration.batches import pad, plan_batches, unpad, valid_mask
from reap_stream.errors import OutputError, ReadError, ReapStreamError, ResumeError, UsageError

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=["memory", "file"])
def spill_path(request, tmp_path):
    return tmp_path / "spill" if request.param == "file" else None


def random_states(tokens, hidden, dtype=torch.float32, seed=0):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(
    st.sampled_from(DTYPES),
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 12)), max_size=6),
)
def test_file_and_memory_hold_what_a_tensor_holds(tmp_path_factory, dtype, writes):
    want = random_states(12, 5, dtype)
    spill = tmp_path_factory.mktemp("spill") / "states"
    with (
        HiddenStates.create(12, 5, dtype, spill_path=None) as memory,
        HiddenStates.create(12, 5, dtype, spill_path=spill) as file,
    ):
        for states in (memory, file):
            states.store(0, want)
        for number, (start, length) in enumerate(writes, start=1):
            stop = min(start + length, 12)
            new = random_states(stop - start, 5, dtype, seed=number)
            want[start:stop] = new
            for states in (memory, file):
                states.store(start, new)
            for states in (memory, file):
                assert torch.equal(states.load(start, stop), new)
        assert torch.equal(memory.load(0, 12), want)
        assert torch.equal(file.load(0, 12), want)
        assert memory.nbytes == file.nbytes == 12 * 5 * dtype.itemsize


def test_memory_loads_views_and_takes_strided_tensors(spill_path):
    states = HiddenStates.create(4, 3, torch.float32, spill_path=spill_path)
    turned = random_states(3, 4).T
    states.store(0, turned)
    assert torch.equal(states.load(0, 4), turned)
    if spill_path is None:
        assert states.load(1, 3).data_ptr() == states.load(0, 4).data_ptr() + 12


def test_spill_file_has_no_name_and_its_room_is_reserved(tmp_path):
    with HiddenStates.create(1000, 8, torch.float32, spill_path=tmp_path / "spill") as states:
        assert list(tmp_path.iterdir()) == []
        status = os.fstat(states._fd)
        assert status.st_size == states.nbytes
        assert status.st_blocks * 512 >= states.nbytes
        assert stat.S_IMODE(status.st_mode) == 0o600


def test_spill_path_that_exists_is_refused(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(OutputError, match="mine"):
        HiddenStates.create(2, 2, torch.float32, spill_path=tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"


def test_too_small_a_disk_is_found_at_once(tmp_path):
    with pytest.raises(OutputError, match="spill"):
        HiddenStates.create(2**44, 2**12, torch.float32, spill_path=tmp_path / "spill")
    assert list(tmp_path.iterdir()) == []


def test_short_reads_and_writes_are_finished(tmp_path, monkeypatch):
    preadv, pwrite = os.preadv, os.pwrite
    states = HiddenStates.create(7, 3, torch.float32, spill_path=tmp_path / "spill")
    want = random_states(7, 3)
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: preadv(fd, [bufs[0][:5]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    states.store(0, want)
    assert torch.equal(states.load(0, 7), want)


def test_spill_file_that_shrinks_is_an_error(tmp_path):
    states = HiddenStates.create(4, 4, torch.float32, spill_path=tmp_path / "spill")
    os.ftruncate(states._fd, 40)
    with pytest.raises(ReadError, match="ended at byte 40, 64 bytes were expected"):
        states.load(0, 4)


@pytest.mark.parametrize(
    ("start", "hidden"),
    [
        (0, torch.zeros(2, 3, dtype=torch.bfloat16)),
        (0, torch.zeros(2, 4)),
        (0, torch.zeros(6)),
        (3, torch.zeros(2, 3)),
        (-1, torch.zeros(2, 3)),
    ],
)
def test_store_refuses_what_does_not_fit(spill_path, start, hidden):
    states = HiddenStates.create(4, 3, torch.float32, spill_path=spill_path)
    with pytest.raises(ReapStreamError):
        states.store(start, hidden)


def test_load_refuses_tokens_out_of_range(spill_path):
    states = HiddenStates.create(4, 3, torch.float32, spill_path=spill_path)
    for start, stop in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises(ReapStreamError, match="out of range"):
            states.load(start, stop)


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.int64, 3), (torch.float32, 0)])
def test_create_refuses(dtype, tokens):
    with pytest.raises(ReapStreamError, match="hidden states cannot be"):
        HiddenStates.create(tokens, 2, dtype, spill_path=None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_snapshot_restores_in_either_place(tmp_path, spill_path, dtype, monkeypatch):
    # Several chunks, the last one short.
    monkeypatch.setattr(activations, "_CHUNK_NBYTES", 3 * 5 * dtype.itemsize)
    want = random_states(10, 5, dtype)
    states = HiddenStates.create(10, 5, dtype, spill_path=spill_path)
    states.store(0, want)
    snapshot = tmp_path / "snapshot.safetensors"
    states.save(snapshot, layer=17, metadata={"run": "f00"})
    assert torch.equal(load_file(snapshot)["hidden_states"], want)
    states.store(0, torch.zeros_like(want))
    assert states.restore(snapshot) == {"run": "f00", "layer": "17"}
    assert torch.equal(states.load(0, 10), want)
    other = HiddenStates.create(10, 5, dtype, spill_path=None)
    other.restore(snapshot)
    assert torch.equal(other.load(0, 10), want)


def test_snapshot_replaces_the_one_before(tmp_path):
    states = HiddenStates.create(3, 2, torch.float32, spill_path=None)
    for layer in (1, 2):
        states.store(0, torch.full((3, 2), float(layer)))
        states.save(tmp_path / "snapshot", layer=layer)
    assert states.restore(tmp_path / "snapshot") == {"layer": "2"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["snapshot"]


def test_failed_snapshot_leaves_the_one_before(tmp_path, monkeypatch):
    states = HiddenStates.create(3, 2, torch.float32, spill_path=None)
    states.store(0, torch.ones(3, 2))
    states.save(tmp_path / "snapshot", layer=1)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OutputError, match="full"):
        states.save(tmp_path / "snapshot", layer=2)
    assert states.restore(tmp_path / "snapshot") == {"layer": "1"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["snapshot"]


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"hidden_states": torch.zeros(3, 2)}, {}),
        ({"hidden_states": torch.zeros(3, 2)}, {"layer": "-1"}),
        ({"hidden_states": torch.zeros(2, 3)}, {"layer": "1"}),
        ({"hidden_states": torch.zeros(3, 2, dtype=torch.float16)}, {"layer": "1"}),
        ({"other": torch.zeros(3, 2)}, {"layer": "1"}),
        ({"hidden_states": torch.zeros(3, 2), "other": torch.zeros(1)}, {"layer": "1"}),
    ],
)
def test_restore_refuses_another_snapshot(tmp_path, spill_path, tensors, metadata):
    states = HiddenStates.create(3, 2, torch.float32, spill_path=spill_path)
    states.store(0, torch.ones(3, 2))
    save_file(tensors, tmp_path / "snapshot", metadata)
    with pytest.raises(ResumeError, match="this run needs"):
        states.restore(tmp_path / "snapshot")
    assert torch.equal(states.load(0, 3), torch.ones(3, 2))


def test_restore_refuses_damaged_files(tmp_path):
    states = HiddenStates.create(3, 2, torch.float32, spill_path=None)
    states.store(0, torch.ones(3, 2))
    states.save(tmp_path / "snapshot", layer=1)
    whole = (tmp_path / "snapshot").read_bytes()
    for damaged in (b"", whole[:-1], whole + b"\0", b"\xff" * len(whole)):
        (tmp_path / "snapshot").write_bytes(damaged)
        with pytest.raises(ResumeError):
            states.restore(tmp_path / "snapshot")
    with pytest.raises(ResumeError, match="absent"):
        states.restore(tmp_path / "absent")


row_lengths = st.lists(st.integers(1, 9), min_size=1, max_size=20)


@given(row_lengths, st.integers(1, 30))
def test_batches_cover_all_rows_within_the_limit(lengths, batch_tokens):
    batches = plan_batches(lengths, batch_tokens)
    order = [row for batch in batches for row in batch.row_indices]
    assert order == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    end = 0
    for batch in batches:
        assert batch.start == end
        assert batch.width == max(batch.lengths)
        assert len(batch.rows) == 1 or len(batch.rows) * batch.width <= batch_tokens
        assert list(batch.lengths) == [lengths[row] for row in batch.row_indices]
        for row, length in zip(batch.rows, batch.lengths, strict=True):
            assert row == slice(end, end + length)
            end = row.stop
        assert batch.stop == end
    assert end == sum(lengths)
    # As full as can be: one more row would not have fitted.
    for batch in batches[:-1]:
        assert (len(batch.rows) + 1) * batch.width > batch_tokens


@given(row_lengths, st.integers(1, 30), st.sampled_from([(), (3,)]))
def test_pad_is_the_naive_rectangle_and_unpad_its_inverse(lengths, batch_tokens, rest):
    for batch in plan_batches(lengths, batch_tokens):
        flat = torch.arange(1, batch.stop - batch.start + 1).reshape(-1, *[1] * len(rest))
        flat = flat.expand(-1, *rest).contiguous()
        want = torch.zeros(len(batch.lengths), batch.width, *rest, dtype=flat.dtype)
        token = 0
        for row, length in enumerate(batch.lengths):
            for column in range(length):
                want[row, column] = flat[token]
                token += 1
        padded = pad(flat, batch)
        assert torch.equal(padded, want)
        assert torch.equal(unpad(padded, batch), flat)
        mask = valid_mask(batch)
        assert mask.dtype == torch.bool
        assert torch.equal(padded.reshape(-1, *rest)[mask], flat)
        if len(set(batch.lengths)) == 1:
            assert padded.data_ptr() == flat.data_ptr()
            assert unpad(padded, batch).data_ptr() == flat.data_ptr()


@pytest.mark.parametrize(("lengths", "batch_tokens"), [([3, 0], 8), ([3], 0), ([], 0)])
def test_plan_batches_refuses(lengths, batch_tokens):
    with pytest.raises(UsageError, match="at least 1"):
        plan_batches(lengths, batch_tokens)


def test_no_rows_are_no_batches():
    assert plan_batches([], 8) == []
