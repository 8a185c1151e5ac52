"""Plans, and what checkpoints without weights are described as, as tests ask for them."""

from __future__ import annotations

import json

from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.model.described import describe_model
from reap_stream.planning import plan_pruning
from reap_stream.settings import OutputSettings
from tests.builders import load_tensors, read_config
from tests.engine import run_settings

INDEX = "model.safetensors.index.json"


def plan(model, keep=None, *, sparsity=None, **options):
    output = OutputSettings(output=model / "never", keep=keep, sparsity=sparsity)
    return plan_pruning(run_settings(model, ("unopened",), **options), output)


def config_only(source, directory, *, index=False, **changes):
    """The checkpoint's config.json alone, or with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**read_config(source), **changes}
    (directory / "config.json").write_text(json.dumps(config))
    if index:
        tensors = load_tensors(source)
        weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
        total = sum(tensor.nbytes for tensor in tensors.values())
        document = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(document))
    return directory


def tensors_of(directory):
    found = open_checkpoint(directory).tensors
    return {name: (ref.dtype, ref.shape, ref.nbytes) for name, ref in found.items()}


def described_tensors(directory):
    described = describe_model(directory)
    found = described.model.checkpoint.tensors
    tensors = {name: (ref.dtype, ref.shape, ref.nbytes) for name, ref in found.items()}
    return tensors, described.notes
