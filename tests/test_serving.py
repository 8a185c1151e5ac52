"""What engines will make of a pruned checkpoint is said before and after it is written."""

from __future__ import annotations

import json

import pytest
import torch

from reap_stream.planning import plan_pruning
from reap_stream.settings import OutputSettings
from tests.builders import load_tensors, quantise, read_config, write_checkpoint
from tests.engine import prune_to, read_kept, run_settings
from tests.families import NUM_EXPERTS

WIDE = {"hidden_size": 128, "moe_intermediate_size": 96}


def warnings(source, keep, weights="keep"):
    planned = plan_pruning(
        run_settings(source, ["builtin"], samples=2, sequence_length=16),
        OutputSettings(output=source, keep=str(keep), weights=weights),
    )
    return planned.variants[0].warnings


def test_uneven_counts_are_told(tiny):
    source = tiny("qwen3_moe")
    assert not [text for text in warnings(source, 8) if "expert parallelism" in text]
    (six,) = [text for text in warnings(source, 6) if "expert parallelism" in text]
    assert "6 experts do not divide by 4, 8:" in six
    (five,) = [text for text in warnings(source, 5) if "expert parallelism" in text]
    assert "5 experts do not divide by 2, 4, 8:" in five


@pytest.mark.parametrize(
    ("block", "cut"), [(16, "4, 8"), (12, None), (48, "4, 8"), (32, "2, 4, 8")]
)
def test_block_widths_that_tensor_parallelism_cuts(block, cut, tiny, tmp_path):
    source, _ = quantise(tiny("qwen3_moe", **WIDE), tmp_path, "block", block=block)
    found = [text for text in warnings(source, 8) if "tensor parallelism" in text]
    if cut is None:
        assert found == []
        return
    (text,) = found
    assert f"96 wide in blocks of {block}" in text
    assert f"over {cut} devices" in text


@pytest.mark.parametrize("block", [None, 16, 64])
def test_blocks_are_those_that_will_be_written(block, tiny, tmp_path):
    source = tiny("qwen3_moe", hidden_size=256, head_dim=64, moe_intermediate_size=384)
    if block is not None:
        source, _ = quantise(source, tmp_path, "block", block=block)
    (text,) = [text for text in warnings(source, 8, "fp8") if "tensor parallelism" in text]
    assert "384 wide in blocks of 128: tensor parallelism over 2, 4, 8 devices" in text
    for weights in ("fp8-channel", "bf16"):
        assert not [text for text in warnings(source, 8, weights) if "tensor parallelism" in text]


def test_channel_scales_can_be_cut_anywhere(tiny, tmp_path):
    source, _ = quantise(tiny("qwen3_moe", **WIDE), tmp_path, "channel")
    assert not [text for text in warnings(source, 8) if "tensor parallelism" in text]


def input_scale(layer, expert):
    """A static scale for each expert, all different, the largest elsewhere in each layer."""
    return 1.0 + (expert + 3 * layer) % NUM_EXPERTS


@pytest.fixture(scope="module")
def static(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("static")
    stored, _ = quantise(tiny("qwen2_moe"), directory, "tensor")
    tensors, config = load_tensors(stored), read_config(stored)
    for name in [name for name in tensors if ".experts." in name and name.endswith(".weight")]:
        layer, expert = (int(part) for part in name.split(".") if part.isdigit())
        scale = torch.tensor(input_scale(layer, expert))
        tensors[name.removesuffix("weight") + "input_scale"] = scale
    config["quantization_config"]["activation_scheme"] = "static"
    return write_checkpoint(directory / "scales", tensors, config)


def test_static_scales_are_warned_of(static):
    (text,) = [text for text in warnings(static, 4) if "static activation scales" in text]
    layers, projections = 3, 3
    assert f"{4 * layers * projections} static" in text
    assert not [t for t in warnings(static, NUM_EXPERTS) if "static activation scales" in t]


def test_the_record_names_where_the_largest_scale_went(static, calibration, tmp_path):
    output = prune_to(tmp_path / "pruned", static, calibration, 4)
    record = json.loads((output / "reap" / "run.json").read_text())
    largest = {
        layer: max(input_scale(layer, expert) for expert in experts)
        for layer, experts in read_kept(output).items()
    }
    assert min(largest.values()) < NUM_EXPERTS
    assert record["serving"]["4"]["activation_scale_changes"] == {
        f"model.layers.{layer}.mlp.experts.*.{projection}_proj.input_scale": [NUM_EXPERTS, after]
        for layer, after in largest.items()
        for projection in ("gate", "up", "down")
        if after < NUM_EXPERTS
    }
