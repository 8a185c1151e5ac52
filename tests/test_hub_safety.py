"""What a Hub, a cache or a directory beside the output may not lead to: loss, and endless waiting."""

from __future__ import annotations

import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from reap_stream.checkpoint.providers import local_file, provider_of
from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.errors import CheckpointError, ReadError, UsageError
from reap_stream.hub.names import HubName
from reap_stream.hub.opening import Need, opened_hub_model
from tests.hub_server import Fault, HubServer
from tests.loopback import blob_id

NAME = "org/guarded-moe"
SHARD = "model.safetensors"
OLD, OTHER = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def source(tiny):
    return tiny("glm4_moe", num_nextn_predict_layers=0)


def opened(work=None, need=Need.HEADERS):
    return opened_hub_model(HubName(NAME, None), need, work=work)


def fill(folder):
    """A folder that somebody cares for."""
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work", encoding="utf-8")
    return folder


def files_below(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def linked(work):
    own = fill(work.parent / "own")
    (own / "lock").touch()
    (own / OLD).mkdir()
    work.symlink_to(own)


def with_lock(work, content="12 on host"):
    work.mkdir()
    (work / "lock").write_text(content, encoding="utf-8")


def others_beside(work):
    with_lock(work)
    fill(work / "notes")


def linked_commit(work):
    with_lock(work)
    (work / OLD).symlink_to(fill(work.parent / "own"))


def linked_lock(work):
    work.mkdir()
    (work / "lock").symlink_to(fill(work.parent / "own") / "thesis.txt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (linked, "is a link or a file"),
        (lambda work: work.write_text("a file"), "is a link or a file"),
        (fill, "none of this package's files"),
        (lambda work: fill(work / OLD), "holds no lock"),
        (others_beside, "notes: is none of this package's"),
        (linked_commit, f"{OLD}: is none of this package's"),
        (linked_lock, "lock: is none of this package's"),
        (lambda work: with_lock(work, "dependencies:\n"), "lock: is none of this package's"),
        (lambda work: (with_lock(work), fill(work / OLD.upper())), "none of this package's"),
    ],
    ids=["link", "file", "no lock", "lone commit", "notes", "linked commit", "linked lock",
         "other lock", "no commit"],
)  # fmt: skip
def test_a_directory_that_is_not_ours_is_left_alone(hub, tmp_path, make, message):
    work = tmp_path / ".out.reap-source"
    make(work)
    before = files_below(tmp_path)
    with pytest.raises(UsageError, match=message), opened(work):
        pytest.fail("was taken for a work directory")
    assert files_below(tmp_path) == before
    assert not hub.requests


def test_shards_of_other_commits_are_deleted(hub, tmp_path):
    """What a link in them leads to is not: only the link goes."""
    work, own = tmp_path / "work", fill(tmp_path / "own")
    with_lock(work)
    (work / OLD).mkdir()
    (work / OLD / "half.safetensors.partial").write_bytes(b"half")
    (work / OLD / "sub").symlink_to(own)
    with opened(work):
        assert files_below(work) == [
            (work / name).relative_to(work) for name in (hub.commit, "lock")
        ]
    assert not work.exists()
    assert (own / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_a_folder_exchanged_meanwhile_is_not_deleted(hub, tmp_path):
    work, own = tmp_path / "work", fill(tmp_path / "own")
    folder = work / hub.commit

    def exchange():
        with opened(work):
            folder.rmdir()
            folder.symlink_to(own)

    with pytest.raises(UsageError, match="is no folder of shards"):
        exchange()
    assert (own / "thesis.txt").exists()


def set_sibling(**values):
    def change(document):
        document["siblings"][0].update(values)

    return change


def set_large(**values):
    def change(document):
        next(entry for entry in document["siblings"] if "lfs" in entry)["lfs"].update(values)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.update(sha="../.."), r"no commit but '\.\./\.\.'"),
        (lambda document: document.update(sha=None), "no commit but None"),
        (lambda document: document.update(sha="A" * 40), "no commit"),
        (lambda document: document.update(sha="a" * 41), "no commit"),
        (set_sibling(rfilename="../../escaped.json"), "no path inside the repository"),
        (set_sibling(rfilename="/etc/escaped"), "no path inside the repository"),
        (set_sibling(rfilename="a/../b"), "no path inside the repository"),
        (set_sibling(rfilename=""), "no path inside the repository"),
        (set_sibling(rfilename="a\0b"), "no path inside the repository"),
        (set_sibling(size=-1), "no length and hash"),
        (set_sibling(size=None), "no length and hash"),
        (set_sibling(blobId="../../../blob"), "no length and hash"),
        (set_sibling(blobId=None), "no length and hash"),
        (set_large(sha256="/etc/passwd"), "no length and hash"),
        (set_large(sha256="f" * 63), "no length and hash"),
    ],
)  # fmt: skip
def test_a_listing_that_cannot_be_is_refused(hub, tmp_path, change, message):
    hub.alter = change
    with pytest.raises(CheckpointError, match=message) as raised, opened(tmp_path / "work"):
        pytest.fail("was believed")
    assert "is HF_ENDPOINT a Hub?" in str(raised.value)
    assert not (tmp_path / "work").exists()
    assert len(hub.requests) == 1


def without_links(cache):
    """The cache as the library makes it where the disk has no links."""
    for path in [path for path in cache.rglob("*") if path.is_symlink()]:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    for blobs in list(cache.rglob("blobs")):
        shutil.rmtree(blobs)


def test_weights_tell_models_apart_in_a_cache_without_links(hub, tmp_path, monkeypatch):
    with opened(need=Need.SIDE_FILES) as directory:
        local_file(directory / SHARD)
    without_links(tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def fingerprint():
        with opened() as directory:
            return open_checkpoint(directory).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    (shard,) = (tmp_path / "cache").rglob(f"snapshots/*/{SHARD}")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert fingerprint() != first


def test_an_offline_cache_is_looked_into_and_no_path(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    match = f"there is no path {NAME} here; looked into the Hub's cache: .*offline mode is on"
    with pytest.raises(CheckpointError, match=match), opened():
        pytest.fail("the cache is empty")


def test_a_shard_that_cannot_be_asked_for_is_not_waited_for(hub, tmp_path):
    """A damaged cache is found again by the second who asks, who would else wait for ever."""
    with opened(need=Need.SIDE_FILES) as directory:
        local_file(directory / SHARD)
    (shard,) = (tmp_path / "cache").rglob(f"snapshots/*/{SHARD}")
    content = shard.read_bytes()
    # The pool outside: its end waits for its thread, and the provider's end wakes that.
    with ThreadPoolExecutor(1) as pool, opened() as directory:
        shard.resolve().write_bytes(b"cut")
        for _ in range(2):
            asked = pool.submit(provider_of(directory).ensure, [SHARD])
            with pytest.raises(ReadError, match="the cache's copy is damaged"):
                asked.result(timeout=20)
        shard.resolve().write_bytes(content)
        assert pool.submit(local_file, directory / SHARD).result(timeout=20) == shard


def slow(hub: HubServer) -> None:
    hub.faults.append(Fault(SHARD, "slow", seconds=0.3, times=99))


def test_who_waits_for_a_shard_is_told_of_the_end(hub, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        with opened(tmp_path / "work") as directory:
            provider = provider_of(directory)
            slow(hub)
            provider.prefetch([SHARD])
            waiting = pool.submit(provider.ensure, [SHARD])
        with pytest.raises(ReadError, match="broken off, since the command ended"):
            waiting.result(timeout=20)
        with pytest.raises(ReadError, match="broken off"):
            provider.ensure(["config.json"])


@pytest.mark.parametrize("evict", [False, True], ids=["cache", "work"])
def test_an_interrupt_does_not_wait_for_a_shard(hub, tmp_path, monkeypatch, evict):
    """Threads that are joined on the way out get an error and not the shard."""
    monkeypatch.setattr("reap_stream.hub.provider._PATIENCE_SECONDS", 0.1)
    before = signal.getsignal(signal.SIGINT)
    work = tmp_path / "work" if evict else None

    def wait_and_be_interrupted():
        with opened(work) as directory, ThreadPoolExecutor(1) as pool:
            slow(hub)
            waiting.append(pool.submit(provider_of(directory).ensure, [SHARD]))
            signal.raise_signal(signal.SIGINT)

    waiting = []
    with pytest.raises(KeyboardInterrupt):
        wait_and_be_interrupted()
    # Leaving the block joined the thread: had it waited for the shard, it would have it.
    with pytest.raises(ReadError, match="broken off, since the command ended"):
        waiting[0].result(timeout=20)
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_left_alone_outside_the_main_thread(hub):
    def handler():
        with opened():
            return signal.getsignal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handler).result(timeout=20) is before


def test_names_that_git_knows_are_taken(hub, source, tmp_path):
    """Blanks, a backslash, dots and other alphabets are no way out of a directory."""
    odd = tmp_path / "odd"
    odd.mkdir()
    for path in source.iterdir():
        (odd / path.name).symlink_to(path)
    names = ["a b.txt", "a\\b.txt", "..c.txt", "d..txt", "ключ.txt"]
    for name in names:
        (odd / name).write_text(name, encoding="utf-8")
    assert len(blob_id((odd / names[0]).read_bytes())) == 40
    hub.add(NAME, odd)
    with opened() as directory:
        assert set(names) <= set(provider_of(directory).names)
