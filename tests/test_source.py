"""Checkpoint directories: what is opened, what goes along, and what is refused."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from reap_stream.checkpoint.source import has_weights, open_checkpoint, open_config
from reap_stream.errors import CheckpointError
from tests.shards import (
    CONFIG,
    FIRST,
    INDEX,
    SECOND,
    SHARDS,
    weight_map,
    write_checkpoint,
    write_index,
)


@pytest.fixture
def directory(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")


def test_sharded(directory):
    checkpoint = open_checkpoint(directory)
    assert checkpoint.directory == directory
    assert checkpoint.config == {"num_experts": 8, "time_step_limit": [0.0, float("inf")]}
    assert checkpoint.config_text == CONFIG
    assert checkpoint.shards == (directory / FIRST, directory / SECOND)
    assert checkpoint.index_metadata == {"total_size": 37}
    assert checkpoint.metadata == {"format": "pt", "shard": FIRST}
    assert checkpoint.nbytes == 37
    assert checkpoint.side_files == checkpoint.skipped_files == ()
    expected = {name: array for shard in SHARDS.values() for name, array in shard.items()}
    assert checkpoint.tensors.keys() == expected.keys()
    for name, ref in checkpoint.tensors.items():
        raw = ref.file.read_bytes()[ref.offset : ref.offset + ref.nbytes]
        assert raw == expected[name].tobytes()
        assert ref.shape == expected[name].shape


def test_single_file_without_index(tmp_path):
    write_checkpoint(tmp_path, {"model.safetensors": SHARDS[FIRST]}, index=False)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == {"a", "b"}
    assert checkpoint.index_metadata == {}


@pytest.mark.parametrize("pattern", ["model-{}-of-2", "model.safetensors-0000{}-of-00002"])
def test_numbered_series_without_index(tmp_path, pattern):
    shards = {
        f"{pattern.format(i)}.safetensors": tensors
        for i, tensors in enumerate(SHARDS.values(), start=1)
    }
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, shards, index=False))
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert [path.name for path in checkpoint.shards] == list(shards)


def test_shards_in_a_folder(tmp_path):
    (tmp_path / "weights").mkdir()
    shards = {f"weights/{name}": tensors for name, tensors in SHARDS.items()}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, shards))
    assert checkpoint.shards[0] == tmp_path / "weights" / FIRST
    assert checkpoint.side_files == checkpoint.skipped_files == ()


def test_shards_the_index_does_not_name_stay_behind(directory):
    save_file({"a": np.zeros(1)}, directory / "consolidated.safetensors")
    save_file({"z": np.zeros(1)}, directory / "model-00003-of-00003.safetensors")
    checkpoint = open_checkpoint(directory)
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert checkpoint.skipped_files == (
        "consolidated.safetensors",
        "model-00003-of-00003.safetensors",
    )


def test_side_files_go_along_and_other_weights_do_not(directory):
    side = (
        "LICENSE",
        "README.md",
        "chat_templates/tools.jinja",
        "generation_config.json",
        "modeling_custom.py",
        "tokenizer.model",
        "vision/config.json",
    )
    skipped_files = (
        "TF_model.H5",
        "model.gguf",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    skipped_folders = ("original/", "vision/__pycache__/")
    hidden = (".gitattributes", ".git/config", ".cache/huggingface/x.lock", "vision/.DS_Store")
    inside = ("original/params.json", "vision/__pycache__/x.pyc")
    for name in (*side, *skipped_files, *hidden, *inside):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    os.mkfifo(directory / "pipe")
    checkpoint = open_checkpoint(directory)
    assert checkpoint.side_files == side
    assert checkpoint.skipped_files == tuple(sorted((*skipped_files, *skipped_folders, "pipe")))


def test_fingerprint_follows_structure_not_place_or_time(directory, tmp_path):
    before = open_checkpoint(directory).fingerprint
    copy = shutil.copytree(directory, tmp_path / "copy")
    os.utime(copy / FIRST, (1, 1))
    (copy / "tokenizer.json").write_text("{}")
    assert open_checkpoint(copy).fingerprint == before

    (copy / "config.json").write_text(CONFIG + " ")
    assert open_checkpoint(copy).fingerprint != before

    # The same length, so that only the header's bytes tell.
    reshaped = shutil.copytree(directory, tmp_path / "reshaped")
    blob = (reshaped / FIRST).read_bytes()
    (reshaped / FIRST).write_bytes(blob.replace(b'"shape":[2,2]', b'"shape":[4,1]'))
    assert open_checkpoint(reshaped).tensors["b"].shape == (4, 1)
    assert open_checkpoint(reshaped).fingerprint != before

    renamed = shutil.copytree(directory, tmp_path / "renamed")
    (renamed / FIRST).rename(renamed / "model-0.safetensors")
    write_index(renamed, {"a": "model-0.safetensors", "b": "model-0.safetensors", "c": SECOND})
    assert open_checkpoint(renamed).fingerprint != before


def fingerprint_with(directory, change):
    """The fingerprint after `change` on the data of the one shard, whose header stays."""
    path = directory / "model.safetensors"
    nbytes = next(iter(open_checkpoint(directory).tensors.values())).nbytes
    blob = path.read_bytes()
    data = np.frombuffer(blob[-nbytes:], np.float32).copy()
    change(data)
    path.write_bytes(blob[:-nbytes] + data.tobytes())
    return open_checkpoint(directory).fingerprint


# The longer one has more data than is sampled.
@pytest.mark.parametrize("count", [512, 1 << 20])
def test_fingerprint_tells_trainings_of_one_architecture_apart(count, tmp_path):
    weight = np.random.default_rng(0).standard_normal(count, np.float32)
    write_checkpoint(tmp_path, {"model.safetensors": {"a": weight}}, index=False)
    before = open_checkpoint(tmp_path).fingerprint
    assert fingerprint_with(tmp_path, lambda _: None) == before

    def train(data):
        data *= np.float32(1.001)

    def change(place):
        return lambda data: data.__setitem__(place, 7)

    found = [before, *(fingerprint_with(tmp_path, f) for f in (train, change(0), change(-1)))]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", []),
        ("text_config", "x"),
        ("text_config", [1]),
        ("architectures", "Glm"),
        ("architectures", [5]),
    ],
)
def test_config_values_of_the_wrong_type(key, value, directory):
    (directory / "config.json").write_text(json.dumps({key: value}))
    for opened in (open_checkpoint, open_config):
        with pytest.raises(CheckpointError, match=f"config.json: {key} is "):
            opened(directory)


@pytest.mark.parametrize("change", [-1, 1])
def test_shard_of_the_wrong_length(directory, change):
    path = directory / SECOND
    nbytes = path.stat().st_size
    os.truncate(path, nbytes + change)
    with pytest.raises(CheckpointError, match=f"{SECOND}.* {nbytes + change} bytes.* {nbytes}"):
        open_checkpoint(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    assert not has_weights(tmp_path)
    with pytest.raises(CheckpointError, match=f"only pickled weights .*{name}.*convert"):
        open_checkpoint(tmp_path)


def test_checkpoint_of_no_tensors(tmp_path):
    write_checkpoint(tmp_path, {"model.safetensors": {}}, index=False)
    with pytest.raises(CheckpointError, match="none of which holds a tensor"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[1]", "a JSON object is expected, not list"),
        ('{"num_experts": 8, "num_experts": 4}', "'num_experts' stands twice"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "number of 5000 digits"),
        ('{"a": "\udcff"}', "not valid UTF-8"),
        ("\ufeff{}", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("opened_by", [open_checkpoint, open_config])
def test_malformed_config(directory, text, message, opened_by):
    (directory / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        opened_by(directory)


@pytest.mark.parametrize("opened_by", [open_checkpoint, open_config])
def test_no_config(directory, opened_by):
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        opened_by(directory)


@pytest.mark.parametrize("opened_by", [open_checkpoint, open_config, has_weights])
def test_no_directory(tmp_path, opened_by):
    with pytest.raises(CheckpointError, match="no such directory"):
        opened_by(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: a file; give the directory"):
        opened_by(tmp_path / "file")


def test_side_file_whose_name_is_not_text(directory):
    try:
        (directory / os.fsdecode(b"\xff.txt")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(CheckpointError, match=r"'\\udcff\.txt' is not UTF-8"):
        open_checkpoint(directory)


def test_config_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"n": 1}')
    opened = open_config(tmp_path)
    assert (opened.config, opened.config_text) == ({"n": 1}, '{"n": 1}')
    assert opened.weight_map is None
    assert opened.total_size is None
    assert not has_weights(tmp_path)


@pytest.mark.parametrize(
    ("total_size", "nbytes"),
    [(37, 37), (37.0, 37), (37.5, None), (1e999, None), (-1, None), ("37", None), (True, None)],
)
def test_config_and_index_without_shards(tmp_path, total_size, nbytes):
    (tmp_path / "config.json").write_text("{}")
    text = json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map()})
    (tmp_path / INDEX).write_text(text.replace("Infinity", "1e999"))
    opened = open_config(tmp_path)
    assert opened.weight_map == weight_map()
    assert opened.total_size == nbytes
    assert not has_weights(tmp_path)
    with pytest.raises(CheckpointError, match=f"{FIRST}: missing"):
        open_checkpoint(tmp_path)


def test_incomplete_download_counts_as_having_weights(directory):
    (directory / FIRST).unlink()
    assert has_weights(directory)
    with pytest.raises(CheckpointError, match=f"{FIRST}: missing"):
        open_checkpoint(directory)


def test_opening_reads_no_more_than_a_sample(directory, monkeypatch):
    """A shard of a gibibyte, sparse: read whole it would show in the bytes pread returns."""
    nbytes = 2**30
    blob = save({"c": np.zeros(16, "u1")}).replace(b"[16]", b"[%d]" % nbytes)
    blob = blob.replace(b"[0,16]", b"[0,%d]" % nbytes)
    text = blob[8:-16].rstrip()
    with (directory / SECOND).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + nbytes)
    counted = []
    pread = os.pread

    def counting(fd, count, offset):
        part = pread(fd, count, offset)
        counted.append(len(part))
        return part

    monkeypatch.setattr(os, "pread", counting)
    assert open_checkpoint(directory).tensors["c"].nbytes == nbytes
    assert sum(counted) < 256 * 4096 + 10_000
