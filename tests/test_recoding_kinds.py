"""Which weights are recoded where names alone do not tell: prediction layers, towers, spare experts."""

from __future__ import annotations

import pytest
import torch

from reap_stream.verifying import verify_directory
from tests.builders import (
    add_mtp,
    load_tensors,
    quantise,
    read_config,
    save,
    tiny_model,
    write_checkpoint,
)
from tests.engine import prune_to
from tests.families import BY_ID, NUM_EXPERTS

KEEP = 4
WIDTHS = {
    "hidden_size": 128,
    "head_dim": 32,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
TOWER = "tower.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A checkpoint with a prediction layer in bfloat16, each expert's matrices stored apart."""
    directory = tmp_path_factory.mktemp("apart")
    model = tiny_model(BY_ID["qwen3_5_moe_text"], **WIDTHS)
    source = add_mtp(save(model, directory / "decoder"), directory / "mtp", "mtp")
    tensors = {name: t.to(torch.bfloat16) for name, t in load_tensors(source).items()}
    return write_checkpoint(directory / "bf16", tensors, read_config(source))


@pytest.fixture(scope="module")
def pruned(apart, calibration, tmp_path_factory):
    return load_tensors(
        prune_to(tmp_path_factory.mktemp("out") / "o", apart, calibration, KEEP, weights="fp8")
    )


def fuse(tensors, blocks):
    """The same checkpoint with the experts of some blocks in one tensor."""
    rest = {n: t for n, t in tensors.items() if not n.startswith(tuple(blocks))}
    for block in blocks:
        gate, up, down = (
            [tensors[f"{block}{e}.{part}_proj.weight"] for e in range(NUM_EXPERTS)]
            for part in ("gate", "up", "down")
        )
        pairs = zip(gate, up, strict=True)
        rest[f"{block}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        rest[f"{block}down_proj"] = torch.stack(down)
    return rest


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].float(), tensor.float()), name


@pytest.mark.parametrize("fused", ["mtp", "decoder"])
def test_experts_stored_otherwise_than_the_decoders(fused, apart, pruned, calibration, tmp_path):
    layers = range(read_config(apart)["num_hidden_layers"])
    decoder = [f"model.layers.{layer}.mlp.experts." for layer in layers]
    blocks = {"mtp": ["mtp.layers.0.mlp.experts."], "decoder": decoder}[fused]
    tensors = fuse(load_tensors(apart), blocks)
    source = write_checkpoint(tmp_path / "source", tensors, read_config(apart))
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights="fp8")
    assert pruned["mtp.layers.0.mlp.experts.0.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert_equal(load_tensors(output), pruned)
    verify_directory(output, source)


def test_more_experts_than_the_decoder_has(apart, calibration, tmp_path):
    first = prune_to(tmp_path / "first", apart, calibration, 6, mtp="keep")
    output = prune_to(tmp_path / "out", first, calibration, KEEP, mtp="keep", weights="fp8")
    found = load_tensors(output)
    for expert in range(NUM_EXPERTS):
        name = f"mtp.layers.0.mlp.experts.{expert}.up_proj.weight"
        assert found[name].dtype == torch.float8_e4m3fn
        assert f"{name}_scale_inv" in found
    verify_directory(output, first)


def test_a_tower_with_the_decoders_names_stays(apart, pruned, calibration, tmp_path):
    weight = torch.randn(128, 128).to(torch.bfloat16)
    tensors = {**load_tensors(apart), f"{TOWER}.weight": weight}
    source = write_checkpoint(tmp_path / "source", tensors, read_config(apart))
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights="fp8")
    assert_equal(load_tensors(output), {**pruned, f"{TOWER}.weight": weight})
    assert TOWER in read_config(output)["quantization_config"]["modules_to_not_convert"]


@pytest.mark.parametrize("weights", ["bf16", "fp8"])
def test_experts_behind_the_models_own_stay(weights, tiny, calibration, tmp_path):
    source = tiny("longcat_flash")
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights=weights)
    before, found = load_tensors(source), load_tensors(output)
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    assert torch.equal(found[name.format(KEEP)], before[name.format(NUM_EXPERTS)])
    own = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[weights]
    assert [found[name.format(e)].dtype for e in range(KEEP)] == [own] * KEEP
    verify_directory(output, source)


def test_static_activation_scales_do_not_outlive_their_settings(calibration, tmp_path):
    model = tiny_model(BY_ID["glm4_moe"], hidden_size=128, moe_intermediate_size=128)
    stored, _ = quantise(save(model, tmp_path / "plain"), tmp_path, "channel")
    tensors, config = load_tensors(stored), read_config(stored)
    for name in [name for name in tensors if ".experts." in name and name.endswith(".weight")]:
        tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.5)
    for name in [name for name in tensors if name.endswith("self_attn.q_proj.weight")]:
        tensors[name] = tensors[name].to(torch.bfloat16)
        del tensors[name + "_scale"]
    source = write_checkpoint(tmp_path / "static", tensors, config)
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP, weights="fp8-channel")
    written = load_tensors(output)
    assert not [name for name in written if name.endswith("input_scale")]
    assert sum(name.endswith("down_proj.weight_scale") for name in written) > KEEP
    group = read_config(output)["quantization_config"]["config_groups"]["group_0"]
    assert group["input_activations"]["dynamic"] is True
    verify_directory(output, source)
