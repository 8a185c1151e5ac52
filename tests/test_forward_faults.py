from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from reap_stream.errors import UnsupportedError
from reap_stream.model.opened import check_forward, forward_faults, open_model
from tests.builders import quantise


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory):
    stored, _ = quantise(tiny("glm4_moe"), tmp_path_factory.mktemp("faults"), "channel")
    return stored


def is_code(name):
    return ".experts." in name and name.endswith(".weight")


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def retyped(dtype):
    """Experts' codes taken for those of another format, as W8A8 checkpoints have them."""
    return lambda tensors: {
        key: value.view(dtype) if is_code(key) else value for key, value in tensors.items()
    }


def halved(tensors):
    """Two codes in a byte."""
    return {
        key: value.view(torch.uint8)[:, ::2].contiguous() if is_code(key) else value
        for key, value in tensors.items()
    }


def renamed(tensors):
    return {
        f"{key}_packed" if key.endswith("q_proj.weight") else key: value
        for key, value in tensors.items()
    }


def narrowed(tensors):
    """Experts of a model of another width, in bfloat16."""
    return {
        key: torch.zeros(16, 64, dtype=torch.bfloat16) if is_code(key) else value
        for key, value in tensors.items()
    }


FAULTS = {
    "dense weight missing": (
        without("model.layers.1.self_attn.o_proj.weight"),
        "no tensor for parameter 'model.layers.1.self_attn.o_proj.weight'",
    ),
    "norm missing": (
        without("model.layers.0.input_layernorm.weight"),
        "no tensor for parameter 'model.layers.0.input_layernorm.weight'",
    ),
    "packed dense weight": (
        renamed,
        r"'model.layers.0.self_attn.q_proj.weight' is stored in a format .*q_proj.weight_packed'",
    ),
    "INT16 experts": (retyped(torch.int16), "experts.*holds I16 codes"),
    "packed experts": (halved, "experts.*holds U8 codes"),
    "experts of another width": (
        narrowed,
        r"\[16, 64\] hold 8192 elements, .*experts.down_proj.* 4096",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_forward_cannot_run_is_refused(fault, sound, tmp_path):
    edit, message = FAULTS[fault]
    (shard,) = sound.glob("*.safetensors")
    tensors = edit(load_file(shard))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((sound / "config.json").read_bytes())
    model = open_model(tmp_path)
    with pytest.raises(UnsupportedError, match=message) as refused:
        check_forward(model)
    assert str(tmp_path) in str(refused.value)


def test_a_sound_checkpoint_has_no_fault(sound):
    assert list(forward_faults(open_model(sound))) == []


def test_a_router_is_a_parameter_too(sound, tmp_path):
    (shard,) = sound.glob("*.safetensors")
    tensors = without("model.layers.1.mlp.gate.e_score_correction_bias")(load_file(shard))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((sound / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="e_score_correction_bias"):
        open_model(tmp_path)
