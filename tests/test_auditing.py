"""Every written checkpoint is read as an engine would read it before anybody else does."""

from __future__ import annotations

import json
import re

import pytest
import torch

from reap_stream import pruning
from reap_stream.auditing import audit
from reap_stream.errors import OutputError, VerificationError
from reap_stream.model.opened import open_model
from reap_stream.verifying import verify_directory
from tests.builders import add_mtp, load_tensors, quantise, read_config, write_checkpoint
from tests.engine import prune_to

KEEP = 6
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.{}"
SCALE = EXPERT.format(2, "up", "weight_scale_inv")
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """GLM-4-MoE with a prediction layer, in block FP8."""
    directory = tmp_path_factory.mktemp("audited")
    plain = add_mtp(tiny("glm4_moe"), directory / "plain", "nextn")
    return quantise(plain, directory, "block", block=16)[0]


@pytest.fixture(scope="module")
def opened(source):
    return open_model(source)


@pytest.fixture(scope="module")
def pruned(source, calibration, tmp_path_factory):
    return prune_to(tmp_path_factory.mktemp("out") / "pruned", source, calibration, KEEP)


@pytest.fixture
def damaged(pruned, tmp_path):
    """Writes the pruned checkpoint anew after `change(tensors, config)`."""

    def make(change):
        tensors, config = load_tensors(pruned), read_config(pruned)
        change(tensors, config)
        directory = write_checkpoint(tmp_path / "damaged", tensors, config)
        (directory / "reap").mkdir()
        for path in (pruned / "reap").iterdir():
            (directory / "reap" / path.name).write_bytes(path.read_bytes())
        return directory

    return make


def drop(*prefixes):
    def change(tensors, config):
        found = [name for name in tensors if name.startswith(prefixes)]
        assert found
        for name in found:
            del tensors[name]

    return change


def add_expert(tensors, config):
    for name in [name for name in tensors if name.startswith("model.layers.1.mlp.experts.0.")]:
        tensors[name.replace(".0.", f".{KEEP}.", 1)] = tensors[name].clone()


def set_config(**values):
    return lambda _tensors, config: config.update(values)


def more_mtp_experts(tensors, config):
    prefix = "model.layers.3.mlp.experts."
    for name in [name for name in tensors if name.startswith(prefix + "0.")]:
        tensors[name.replace("experts.0.", f"experts.{KEEP}.")] = tensors[name].clone()


def stale_ignore(tensors, config):
    ignored = ["lm_head", f"model.layers.1.mlp.experts.{KEEP}.up_proj"]
    config["quantization_config"]["modules_to_not_convert"] = ignored


def foreign(tensors, config):
    tensors["model.layers.1.mlp.experts_extra"] = torch.zeros(3)


def reshape(tensors, config):
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name][:-8].clone()


def other_dtype(tensors, config):
    tensors[SCALE] = tensors[SCALE].to(torch.bfloat16)


def renumber(tensors, config):
    for name in [name for name in tensors if f"layers.1.mlp.experts.{KEEP - 1}." in name]:
        tensors[name.replace(f".{KEEP - 1}.", ".9.")] = tensors.pop(name)


DAMAGES = {
    "one expert tensor": (drop(EXPERT.format(3, "gate", "weight")), r"experts\.3\.gate_proj"),
    "a whole expert": (drop("model.layers.1.mlp.experts.3."), "3 is missing"),
    "the last expert": (drop(f"model.layers.1.mlp.experts.{KEEP - 1}."), "5|5 of"),
    "one expert too many": (add_expert, "7|experts"),
    "a hole in the numbers": (renumber, "5 is missing"),
    "config count below the router's rows": (set_config(n_routed_experts=KEEP - 1), "5"),
    "config count above the router's rows": (set_config(n_routed_experts=KEEP + 1), "7"),
    "correction bias": (drop(BIAS), "correction_bias"),
    "router": (drop("model.layers.2.mlp.gate.weight"), r"mlp\.gate\.weight"),
    "one FP8 scale": (drop(SCALE), "weight_scale_inv is missing"),
    "all FP8 scales of a layer": (
        lambda tensors, _config: [
            tensors.pop(name) for name in list(tensors)
            if name.startswith("model.layers.1.mlp.experts") and name.endswith("_inv")
        ],
        "has no scale",
    ),
    "scale of a dense weight": (
        drop("model.layers.0.mlp.up_proj.weight_scale_inv"), "has no scale"
    ),
    "scale of another dtype": (other_dtype, r"BF16 .*F32|F32 .*BF16"),
    "prediction layer with more experts": (more_mtp_experts, "layer 3 has 7 experts"),
    "prediction layer gone, key 1": (drop("model.layers.3."), "speaks of 1"),
    "prediction layer there, key 0": (set_config(num_nextn_predict_layers=0), "speaks of 0"),
    "too few experts for top-k": (set_config(num_experts_per_tok=KEEP + 1), "7"),
    "stale name in quantization_config": (stale_ignore, "past the last of 6"),
    "a tensor nothing claims": (foreign, "claimed by no parameter"),
    "a dense tensor of another shape": (reshape, "q_proj"),
}  # fmt: skip


def test_a_sound_checkpoint_has_no_fault(pruned, opened, source):
    assert audit(pruned, opened) == []
    verify_directory(pruned, source)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_without_the_source_bytes(name, damaged, opened, source):
    change, match = DAMAGES[name]
    directory = damaged(change)
    faults = audit(directory, opened)
    assert faults
    assert re.search(match, "\n".join(faults)), faults
    with pytest.raises(VerificationError):
        verify_directory(directory, source)


def test_swapped_scales_are_found_by_verify(damaged, source):
    def swap(tensors, config):
        other = EXPERT.format(4, "up", "weight_scale_inv")
        assert not torch.equal(tensors[SCALE], tensors[other])
        tensors[SCALE], tensors[other] = tensors[other], tensors[SCALE]

    with pytest.raises(VerificationError, match="weight_scale_inv"):
        verify_directory(damaged(swap), source)


def test_what_the_source_has_wrong_is_let_pass(source, calibration, tmp_path):
    tensors, config = load_tensors(source), read_config(source)
    tensors["model.rotary_extra"] = torch.zeros(3)
    del config["num_nextn_predict_layers"]
    odd = write_checkpoint(tmp_path / "odd", tensors, config)
    output = prune_to(tmp_path / "pruned", odd, calibration, KEEP)
    assert audit(output, open_model(odd)) == []


def test_a_faulty_output_is_not_published(source, calibration, tmp_path, monkeypatch):
    right = pruning.config_text

    def wrong(*arguments, **options):
        config = json.loads(right(*arguments, **options))
        return json.dumps({**config, "n_routed_experts": KEEP + 1})

    monkeypatch.setattr("reap_stream.outputs.config_text", wrong)
    with pytest.raises(OutputError, match="does not pass the audit"):
        prune_to(tmp_path / "pruned", source, calibration, KEEP)
    assert not (tmp_path / "pruned").exists()
