"""Links, FIFOs and the Hub cache: what a checkpoint directory may lead to."""

from __future__ import annotations

import os

import pytest

from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.errors import CheckpointError
from tests.shards import (
    FIRST,
    INDEX,
    SHARDS,
    write_checkpoint,
)


@pytest.fixture
def directory(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize("name", [FIRST, INDEX, "config.json"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "dangling link", "link to itself"])
def test_special_files_are_refused_and_do_not_block(directory, name, kind):
    path = directory / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("nothing" if kind == "dangling link" else name)
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(directory)


@pytest.mark.parametrize("name", [FIRST, INDEX, "config.json", "tokenizer.json"])
def test_links_inside_the_directory_are_followed(directory, name):
    (directory / "tokenizer.json").write_text("{}")
    (directory / ".store").mkdir()
    (directory / name).rename(directory / ".store" / "blob")
    (directory / name).symlink_to(".store/blob")
    checkpoint = open_checkpoint(directory)
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert checkpoint.side_files == ("tokenizer.json",)


@pytest.mark.parametrize("name", [FIRST, INDEX, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["relative", "absolute", "two steps", "folder"])
def test_links_out_of_the_directory_are_refused(directory, name, how):
    outside = directory.parent / "outside"
    outside.mkdir()
    (directory / "tokenizer.json").write_text("{}")
    (directory / name).rename(outside / "secret")
    if how == "two steps":
        (directory / "step").symlink_to(outside)
    target = {"absolute": outside / "secret", "two steps": "step/secret"}
    (directory / name).symlink_to(target.get(how, "../outside/secret"))
    with pytest.raises(CheckpointError, match=f"{name}: leads to .*outside/secret, outside"):
        open_checkpoint(directory)


def test_shard_below_a_linked_folder_is_refused(tmp_path):
    outside = tmp_path / "outside"
    shards = {f"weights/{name}": tensors for name, tensors in SHARDS.items()}
    (tmp_path / "checkpoint" / "weights").mkdir(parents=True)
    directory = write_checkpoint(tmp_path / "checkpoint", shards)
    (directory / "weights").rename(outside)
    (directory / "weights").symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(directory)


def test_linked_folders_stay_behind(directory):
    (directory / "home").symlink_to("/")
    (directory / "loop").symlink_to(".")
    assert open_checkpoint(directory).skipped_files == ("home/", "loop/")


def hub_cache(root):
    """The layout of huggingface_hub: blobs by hash, snapshots of links to them."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    write_checkpoint(snapshot)
    (snapshot / "tokenizer.json").write_text("{}")
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    return snapshot


def test_hub_cache(tmp_path):
    snapshot = hub_cache(tmp_path / "models--org--name")
    checkpoint = open_checkpoint(snapshot)
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert checkpoint.shards[0] == snapshot / FIRST
    assert checkpoint.side_files == ("tokenizer.json",)

    (tmp_path / "shortcut").symlink_to(snapshot)
    assert open_checkpoint(tmp_path / "shortcut").fingerprint == checkpoint.fingerprint


@pytest.mark.parametrize("target", ["../other/secret", "../../refs/secret", "../../blobs2/secret"])
def test_hub_cache_links_lead_to_its_blobs_only(tmp_path, target):
    snapshot = hub_cache(tmp_path / "models--org--name")
    secret = snapshot / target
    secret.parent.mkdir(parents=True)
    secret.touch()
    (snapshot / "vocab.json").symlink_to(target)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(snapshot)


def test_blobs_are_special_only_beside_snapshots(tmp_path):
    directory = write_checkpoint(tmp_path / "revisions" / "main")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").touch()
    (directory / "vocab.json").symlink_to("../../blobs/1")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(directory)
