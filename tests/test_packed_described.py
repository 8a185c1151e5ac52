"""Packed checkpoints without their shards: what config.json and the index tell of them."""

from __future__ import annotations

import pytest
import torch

from reap_stream.errors import UnsupportedError
from reap_stream.inspection import inspect_model
from tests.builders import read_config
from tests.packed_checkpoints import WIDTHS, everywhere, experts_only, pack, pack_gpt_oss
from tests.planning import config_only, described_tensors, plan, tensors_of

PACKED = ["int4", "int4-zero-points", "int8-channel", "nvfp4", "nvfp4-modelopt", "mxfp4"]


@pytest.fixture(scope="module")
def narrow(tiny):
    """A model all of whose linear layers groups of 32 columns divide."""
    return tiny("qwen3_moe", dtype=torch.bfloat16, **WIDTHS)


def settings_left_out(directory, modules):
    """The settings with modules that stay as they are."""
    settings = read_config(directory)["quantization_config"]
    return {**settings, "ignore": [*settings.get("ignore", []), *modules]}


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("packing", PACKED)
def test_tensors_are_those_of_the_shards(packing, index, narrow, tmp_path):
    stored, _ = pack(narrow, tmp_path, everywhere(packing))
    described, notes = described_tensors(config_only(stored, tmp_path / "bare", index=index))
    assert notes == ()
    assert described == tensors_of(stored)


def test_only_what_the_settings_do_not_leave_out_is_packed(narrow, tmp_path):
    stored, _ = pack(narrow, tmp_path, experts_only("int4"))
    settings = settings_left_out(stored, ["re:.*self_attn.*", "re:.*mlp\\.(gate|up|down)_proj.*"])
    bare = config_only(stored, tmp_path / "bare", quantization_config=settings)
    described, _ = described_tensors(bare)
    assert described == tensors_of(stored)


@pytest.mark.parametrize("index", [True, False])
def test_gpt_oss_is_described_as_published(index, tiny, tmp_path):
    source = tiny("gpt_oss", dtype=torch.bfloat16, hidden_size=64, intermediate_size=32)
    stored, _ = pack_gpt_oss(source, tmp_path)
    described, notes = described_tensors(config_only(stored, tmp_path / "bare", index=index))
    assert notes == ()
    assert described == tensors_of(stored)


@pytest.mark.parametrize("packing", PACKED)
def test_parameters_are_counted_as_the_numbers_they_stand_for(packing, narrow, tmp_path):
    stored, meant = pack(narrow, tmp_path, everywhere(packing))
    for directory in (stored, config_only(stored, tmp_path / "bare")):
        planned, expected = plan(directory, keep="4"), plan(meant, keep="4")
        assert planned.facts.total_parameters == expected.facts.total_parameters
        assert planned.facts.active_parameters == expected.facts.active_parameters
        kept = planned.variants[0].total_parameters
        assert kept == expected.variants[0].total_parameters
        assert planned.variants[0].bytes < expected.variants[0].bytes / 2


def test_inspection_names_the_format(narrow, tmp_path):
    stored, _ = pack(narrow, tmp_path, everywhere("int4"))
    assert inspect_model(stored).formats["pack-quantized"] > 0


def test_experts_in_another_format_than_the_settings_say_are_not_guessed(narrow, tmp_path):
    """DeepSeek-V4: quant_method fp8, but experts of four bits."""
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    bare = config_only(narrow, tmp_path, quantization_config=settings, expert_dtype="fp4")
    with pytest.raises(UnsupportedError, match=r"fp8 with experts of fp4.*safetensors shards"):
        plan(bare, keep="4")


def test_settings_that_fit_no_tensor_are_not_believed(narrow, tmp_path):
    bare = config_only(narrow, tmp_path, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UnsupportedError, match=r"quantised, but in none.*safetensors shards"):
        plan(bare, keep="4")
