"""A pruned checkpoint, ways to damage it, and that verification says what was damaged."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import save_file

from reap_stream.errors import VerificationError
from reap_stream.verification import verify
from tests.pruning_source import (
    load_shards,
    make_source,
    write_pruned,
)

KEEP = 3


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "source")


@pytest.fixture
def kept(source):
    # Expert 0 of layer 1 is named in quantization_config.
    return {**source.choose(KEEP), 1: [0, 2, 5]}


@pytest.fixture
def pruned(source, kept, tmp_path):
    write_pruned(source, tmp_path / "pruned", kept)
    return tmp_path / "pruned"


def refuse(pruned, source, match, facts=None):
    with pytest.raises(VerificationError, match=match) as caught:
        verify(pruned, source.directory, facts or source.facts())
    return str(caught.value)


def shard_of(directory, name):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][name]


def edit_json(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def rewrite(directory, change):
    """Let `change` alter the arrays of a directory, then write one sound shard and its index."""
    arrays = load_shards(directory)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    change(arrays)
    filename = "model-00001-of-00001.safetensors"
    save_file(arrays, directory / filename)
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(arrays, filename)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
