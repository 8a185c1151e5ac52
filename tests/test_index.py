"""Which shards belong together: malformed and contradictory indexes, and none at all."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from reap_stream.checkpoint.source import has_weights, open_checkpoint, open_config
from reap_stream.errors import CheckpointError
from tests.shards import (
    FIRST,
    INDEX,
    SECOND,
    weight_map,
    write_checkpoint,
    write_index,
)


@pytest.fixture
def directory(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../model.safetensors", "'../model.safetensors' is not inside"),
        ("x/../../model.safetensors", "is not inside"),
        ("/etc/model.safetensors", "is not inside"),
        ("..\\model.safetensors", "is not inside"),
        ("config.json", "is not a .safetensors file name"),
        ("pytorch_model.bin", "is not a .safetensors file name"),
        ("", "is not a .safetensors file name"),
        (".", "is not a .safetensors file name"),
        ("a\0.safetensors", "is not a .safetensors file name"),
        ("a\x1b[2J.safetensors", "is not a .safetensors file name"),
        ("x" * 300 + ".safetensors", "missing, or a link to nothing"),
        ("model-00003-of-00003.safetensors", "model-00003.*missing, or a link to nothing"),
        (7, "must be a file name, not 7"),
        (None, "must be a file name, not None"),
        (["x.safetensors"], "must be a file name"),
    ],
)
def test_index_with_a_bad_shard(directory, shard, message):
    save_file({"a": np.zeros(1)}, directory.parent / "model.safetensors")
    write_index(directory, weight_map() | {"a": shard})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "a JSON object is expected, not list"),
        ("{}", "weight_map must map"),
        ('{"weight_map": []}', "weight_map must map"),
        ('{"weight_map": {}}', "weight_map must map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' stands twice"),
        ('{"weight_map": {"a": "x.safetensors"}, "weight_map": {}}', "'weight_map' stands twice"),
        ('{"weight_map": {"a": "x.safetensors"}, "metadata": 1}', "metadata must be an object"),
        ('{"weight_map": {"a": "x.safetensors"}, "metadata": {"total_size": NaN}}', "NaN"),
        ('{"weight_map": ' + '{"a":' * 100_000, "nested too deeply"),
        ('{"weight_map": {"\\udc80": "x.safetensors"}}', "not valid UTF-8"),
    ],
)
@pytest.mark.parametrize("opened_by", [open_checkpoint, open_config, has_weights])
def test_malformed_index(directory, text, message, opened_by):
    (directory / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        opened_by(directory)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"a": FIRST, "c": SECOND}, f"does not list tensor 'b', which is in {FIRST}"),
        ({"a": FIRST, "b": SECOND, "c": SECOND}, f"'b' in {SECOND}, it is in {FIRST}"),
        (weight_map() | {"d": SECOND}, f"1 of 4 .* absent, first 'd', which {SECOND} does not"),
        ({"a": FIRST, "b": f"./{FIRST}", "c": SECOND}, "'a' is in .* and in"),
    ],
)
def test_index_that_disagrees_with_the_shards(directory, mapping, message):
    write_index(directory, mapping)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(directory)


def test_index_metadata_may_be_missing(directory):
    write_index(directory, weight_map())
    assert open_checkpoint(directory).index_metadata == {}
    write_index(directory, weight_map(), metadata=None)
    assert open_checkpoint(directory).index_metadata == {}


def test_tensor_in_two_shards(tmp_path):
    shards = {FIRST: {"a": np.zeros(1)}, SECOND: {"a": np.zeros(1)}}
    write_checkpoint(tmp_path, shards, index=False)
    with pytest.raises(CheckpointError, match=f"'a' is in {FIRST} and in {SECOND}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-00001-of-00002"], "1 of 2 shards, number 2 is missing"),
        (["model-00001-of-00003", "model-00003-of-00003"], "2 of 3 shards, number 2 is missing"),
        (["model-00000-of-00002", "model-00001-of-00002"], "number 2 is missing"),
        (["model-1-of-9" + "9" * 200], "number 2 is missing"),
        (["model-1-of-1", "model-01-of-1"], "2 shards for 1 numbers"),
        (["model-1-of-1", "model-2-of-1"], "2 shards for 1 numbers"),
        (["model-1-of-1", "model-1-of-2", "model-2-of-2"], "holds 2 series of shards"),
        (["model", "model-1-of-1"], "holds model.safetensors and numbered shards"),
        (["adapter_model"], "no weights"),
        ([], "no weights"),
    ],
)
def test_names_that_leave_the_shards_open(tmp_path, names, message):
    shards = {f"{name}.safetensors": {f"t{i}": np.zeros(1)} for i, name in enumerate(names)}
    write_checkpoint(tmp_path, shards or {"x": {}}, index=False)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)
