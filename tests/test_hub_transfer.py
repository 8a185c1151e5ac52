"""Shards on their way: very large ones, what an earlier process left, and room found out first."""

from __future__ import annotations

import re
import shutil

import pytest
from huggingface_hub import constants

from reap_stream.checkpoint.providers import provider_of
from reap_stream.cli import main
from reap_stream.errors import CheckpointError, ReadError
from reap_stream.hub.opening import Need
from reap_stream.hub.provider import HubProvider
from tests.hub_checkpoints import RUN, opened, prune, specs, wait_for
from tests.hub_server import Fault

NAME = "org/transferred-moe"
SHARD = "model.safetensors"
PART_NBYTES = 50_000


@pytest.fixture(scope="module")
def source(tiny):
    return tiny("glm4_moe", num_nextn_predict_layers=0)


@pytest.fixture
def is_large(monkeypatch):
    """Makes the shard one that the library does not fetch in one piece."""
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", PART_NBYTES + 1)
    monkeypatch.setattr("reap_stream.hub.fetching._SLICE_NBYTES", PART_NBYTES)


def fetch(work):
    with opened(NAME, work, Need.SIDE_FILES) as directory:
        return provider_of(directory).ensure([SHARD])[0].read_bytes()


@pytest.mark.parametrize("after", [None, 20_000], ids=["whole", "cut"])
def test_a_very_large_shard_comes_in_parts(hub, source, tmp_path, is_large, after):
    if after is not None:
        hub.faults.append(Fault(SHARD, "cut", after=after, times=3))
    content = (source / SHARD).read_bytes()
    assert fetch(tmp_path / "work") == content
    ranges = [request.range for request in hub.asked("GET", SHARD) if request.status == 206]
    asked = [tuple(map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", r).groups())) for r in ranges]
    assert all(end - begin < PART_NBYTES for begin, end in asked)
    assert len({end for _, end in asked}) == -(-len(content) // PART_NBYTES)


def test_a_server_without_ranges_has_no_very_large_shards(hub, tmp_path, is_large):
    hub.ignores_ranges = True
    with pytest.raises(ReadError, match="sends whole files where parts are asked for"):
        fetch(tmp_path / "work")


@pytest.mark.parametrize("xet", [False, True])
def test_a_cache_takes_no_very_large_shard_without_xet(hub, is_large, monkeypatch, sent_for, xet):
    """At the start where it is known, and else when the server offers no other way."""
    monkeypatch.setattr("reap_stream.hub.opening.has_xet", lambda: xet)
    match = f"{SHARD} has .* bytes, and huggingface_hub puts files of more than .* give --evict"
    with pytest.raises(ReadError if xet else CheckpointError, match=match):
        fetch(None)
    assert bool(sent_for) == xet


@pytest.mark.parametrize("is_whole", [True, False])
def test_what_a_process_left_is_checked_and_not_fetched(hub, source, tmp_path, is_whole):
    work = tmp_path / "work"
    folder = work / hub.commit
    folder.mkdir(parents=True)
    (work / "lock").write_text("12 on host", encoding="utf-8")
    shutil.copy(source / SHARD, folder)
    content = bytearray((source / SHARD).read_bytes())
    if not is_whole:
        # As a machine leaves it that lost its power: the length is there, the bytes are not.
        content[-5000:] = bytes(5000)
        (folder / SHARD).write_bytes(content)
    with opened(NAME, work) as directory:
        assert provider_of(directory).remote_nbytes(SHARD) == 0
    assert folder.exists() is False
    folder.mkdir(parents=True)
    (work / "lock").write_text("12 on host", encoding="utf-8")
    (folder / SHARD).write_bytes(content)
    hub.forget()
    assert fetch(work) == (source / SHARD).read_bytes()
    assert (hub.sent(SHARD) > 0) != is_whole


def test_what_is_let_go_on_its_way_is_deleted_when_it_is_there(hub, source, tmp_path):
    """Else a step that turned out to need no tensor of a shard would leave it on the disk."""
    with opened(NAME, tmp_path / "work") as directory:
        provider = provider_of(directory)
        hub.faults.append(Fault(SHARD, "slow", seconds=0.02))
        provider.prefetch([SHARD])
        wait_for(lambda: hub.sent(SHARD) > 100_000)
        provider.release([SHARD])
        half = tmp_path / "work" / hub.commit / f"{SHARD}.partial"
        assert half.exists()
        wait_for(lambda: SHARD not in provider._coming)
        assert not list((tmp_path / "work" / hub.commit).iterdir())
        # Asked for again while it comes, it stays.
        hub.faults.append(Fault(SHARD, "slow", seconds=0.02))
        provider.prefetch([SHARD])
        provider.release([SHARD])
        assert provider.ensure([SHARD])[0].read_bytes() == (source / SHARD).read_bytes()


def test_what_is_let_go_before_it_is_fetched_is_not_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(HubProvider, "_start_threads", lambda _: None)
    with opened(NAME, tmp_path / "work") as directory:
        provider = provider_of(directory)
        provider.prefetch([SHARD])
        assert list(provider._queue) == [SHARD]
        provider.release([SHARD])
        assert not provider._queue
        assert not provider._coming


def test_half_a_shard_needs_half_the_room(hub, source, tmp_path):
    folder = tmp_path / "work" / hub.commit
    folder.mkdir(parents=True)
    (tmp_path / "work" / "lock").write_text("12 on host", encoding="utf-8")
    (folder / f"{SHARD}.partial").write_bytes((source / SHARD).read_bytes()[:1000])
    with opened(NAME, tmp_path / "work") as directory:
        missing = provider_of(directory).remote_nbytes(SHARD)
    assert missing == (source / SHARD).stat().st_size - 1000


@pytest.fixture
def no_room(monkeypatch):
    """Lets disks have so many bytes."""

    def call(nbytes, *, cache=None):
        monkeypatch.setattr("reap_stream.download.free_nbytes", lambda _: nbytes)
        lots = 10**12
        monkeypatch.setattr("reap_stream.hub.opening.free_nbytes", lambda _: cache or lots)

    return call


@pytest.mark.parametrize("evict", [False, True], ids=["cache", "evict"])
@pytest.mark.parametrize("command", ["prune", "observe", "compact", "verify", "eval"])
def test_no_shard_is_fetched_to_a_disk_without_room(
    hub, source, calibration, tmp_path, no_room, sent_for, capsys, command, evict
):
    scores, done = tmp_path / "scores.safetensors", tmp_path / "done"
    calibrated = [*specs(calibration[:1]), *RUN]
    if command == "compact":
        assert main(["observe", NAME, "--output", str(scores), *calibrated, "--evict"]) == 0
    if command == "verify":
        assert prune(source, done, calibration) == 0
    hub.forget()
    sent_for.clear()
    no_room(10_000)
    output = ["--output", str(tmp_path / "out")]
    line = {
        "prune": ["prune", NAME, *output, "--keep", "4", *calibrated],
        "observe": ["observe", NAME, "--output", f"{tmp_path}/s.safetensors", *calibrated],
        "compact": ["compact", NAME, "--scores", str(scores), *output, "--keep", "4"],
        "verify": ["verify", str(done), "--source", NAME],
        "eval": ["eval", NAME, "--text", calibration[0], *RUN, "--scratch", str(tmp_path)],
    }[command]
    assert main([*line, *(["--evict"] if evict else [])]) != 0
    said = capsys.readouterr().err
    assert "the disk has 10000 bytes free" in said
    assert ("give --evict" in said) != evict
    assert not sent_for
    # Headers, and nothing behind them.
    assert hub.sent(SHARD) <= 100_000 < (source / SHARD).stat().st_size
    assert not (tmp_path / "out").exists()


def test_two_disks_are_looked_at_each(hub, calibration, tmp_path, monkeypatch, capsys, sent_for):
    """Shards have room in the cache, but the output has none where it goes."""
    monkeypatch.setattr("reap_stream.download.on_one_disk", lambda a, b: a == b)
    free = {False: 10**9, True: 10_000}
    monkeypatch.setattr("reap_stream.download.free_nbytes", lambda path: free[path.name == "out"])
    assert prune(NAME, tmp_path / "out", calibration) != 0
    assert f"{tmp_path / 'out'}: the disk has 10000 bytes free" in capsys.readouterr().err
    assert not sent_for


def test_a_full_cache_is_found_first(hub, calibration, tmp_path, no_room, capsys, sent_for):
    no_room(10**12, cache=1000)
    assert prune(NAME, tmp_path / "out", calibration) == 2
    assert "1000 free" in capsys.readouterr().err
    assert not sent_for
