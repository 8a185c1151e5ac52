"""Small sharded checkpoints of a few tensors, written by the safetensors library."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
CONFIG = '{"num_experts": 8,\r\n "time_step_limit": [0.0, Infinity]}\n'
SHARDS = {
    "model-00001-of-00002.safetensors": {"a": np.arange(6, dtype="f4"), "b": np.ones((2, 2), "f2")},
    "model-00002-of-00002.safetensors": {"c": np.zeros(5, "i1")},
}
FIRST, SECOND = SHARDS


def weight_map(shards=None):
    shards = shards or SHARDS
    return {tensor: shard for shard, tensors in shards.items() for tensor in tensors}


def write_index(directory, mapping, **more):
    (directory / INDEX).write_text(json.dumps({"weight_map": mapping, **more}))


def write_checkpoint(directory, shards=None, *, index=True):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(CONFIG, newline="")
    for name, tensors in (shards or SHARDS).items():
        save_file(tensors, directory / name, metadata={"format": "pt", "shard": name})
    if index:
        write_index(directory, weight_map(shards), metadata={"total_size": 37})
    return directory
