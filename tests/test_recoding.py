"""Checkpoints pruned into FP8: which tensors and settings are written, and what they compute."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from reap_stream.model.opened import open_model
from reap_stream.recoding.recode import recode
from reap_stream.verifying import verify_directory
from tests.builders import (
    load_tensors,
    read_config,
    save,
    tiny_config,
    tiny_model,
    write_checkpoint,
)
from tests.engine import prune_to, read_kept
from tests.families import BY_ID
from tests.fp8_formula import encoded, meant
from tests.oracle import load_model, run
from tests.oracle_pruning import expected_tensors, prune_by_hand
from tests.recoding import (
    EXPERTS,
    FAMILIES,
    KEEP,
    MODES,
    WIDTHS,
    assert_tensors,
    is_quantised,
    record,
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family_id", FAMILIES)
def test_linear_layers_are_those_of_the_formula(family_id, mode, pruned_to):
    source, output = pruned_to(family_id, mode)
    kept = read_kept(output)
    pruned = expected_tensors(load_tensors(source), kept)
    assert_tensors(output, encoded(pruned, mode, is_quantised(family_id)))
    report = verify_directory(output, source)
    names = [name for name in pruned if is_quantised(family_id)(name)]
    assert report.computed == 2 * len(names)
    assert record(output)["weights"][mode] >= len(names)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family_id", FAMILIES)
def test_config_names_every_linear_layer_left_alone(family_id, mode, pruned_to):
    source, output = pruned_to(family_id, mode)
    config = read_config(output)
    settings = config.pop("quantization_config")
    ignored = settings["modules_to_not_convert" if mode == "fp8" else "ignore"]
    model = AutoModelForCausalLM.from_pretrained(source)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    plain = {n for n in linear if not is_quantised(family_id)(f"{n}.weight")}
    assert plain
    assert plain <= set(ignored)
    assert not [name for name in ignored if is_quantised(family_id)(f"{name}.weight")]
    assert len(ignored) == len(set(ignored))
    # Routers are in transformers modules of their own.
    assert all(name in plain or "gate" in name for name in ignored)
    unpruned = read_config(source)
    count = BY_ID[family_id].count_key
    assert config == {
        **unpruned,
        **{k: KEEP for k in (count, "num_local_experts") if k in unpruned},
    }


def test_config_is_that_of_the_published_checkpoints(pruned_to):
    _, output = pruned_to("glm4_moe", "fp8")
    ignored = ["lm_head", "model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    assert read_config(output)["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ignored,
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    _, output = pruned_to("glm4_moe", "fp8-channel")
    settings = read_config(output)["quantization_config"]
    group = settings["config_groups"]["group_0"]
    assert (settings["quant_method"], settings["format"]) == (
        "compressed-tensors",
        "float-quantized",
    )
    assert settings["ignore"] == ignored
    assert group["targets"] == ["Linear"]
    weights, inputs = group["weights"], group["input_activations"]
    assert (weights["strategy"], weights["dynamic"], weights["num_bits"]) == ("channel", False, 8)
    assert (inputs["strategy"], inputs["dynamic"], inputs["type"]) == ("token", True, "float")


@pytest.mark.parametrize("mode", MODES)
def test_experts_alone(mode, wide, calibration, tmp_path):
    source = wide("glm4_moe")
    output = prune_to(
        tmp_path / "out", source, calibration, KEEP, weights=mode, fp8_experts_only=True
    )
    pruned = expected_tensors(load_tensors(source), read_kept(output))
    assert_tensors(output, encoded(pruned, mode, re.compile(EXPERTS).search))
    settings = read_config(output)["quantization_config"]
    ignored = settings["modules_to_not_convert" if mode == "fp8" else "ignore"]
    assert not [name for name in ignored if ".experts" in name]
    assert {f"model.layers.{i}.self_attn.q_proj" for i in range(3)} <= set(ignored)
    assert {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")} <= set(ignored)
    verify_directory(output, source)


@pytest.mark.parametrize("family_id", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_logits_are_those_of_the_hand_pruned_model(family_id, mode, pruned_to, rows, tmp_path):
    source, output = pruned_to(family_id, mode)
    kept = read_kept(output)
    values = meant(encoded(load_tensors(source), mode, is_quantised(family_id)))
    faked = write_checkpoint(tmp_path / "faked", values, read_config(source))
    family = BY_ID[family_id]
    config = tiny_config(family, **{**WIDTHS, **FAMILIES[family_id][0], family.count_key: KEEP})
    smaller = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    reference = prune_by_hand(load_model(faked), smaller, kept)
    plain = {**read_config(output)}
    del plain["quantization_config"]
    decoded = write_checkpoint(tmp_path / "decoded", meant(load_tensors(output)), plain)
    model = load_model(decoded)
    for row in rows[:3]:
        assert (run(model, row) - run(reference, row)).abs().max() < 1e-5


def test_transformers_loads_it(tmp_path, calibration, rows):
    pytest.importorskip("accelerate", reason="transformers loads no FP8 without accelerate")
    # transformers decodes whole blocks only.
    whole = {**WIDTHS, "moe_intermediate_size": 128, "intermediate_size": 256}
    source = save(tiny_model(BY_ID["glm4_moe"], **whole).to(torch.bfloat16), tmp_path / "source")
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights="fp8")
    model, info = AutoModelForCausalLM.from_pretrained(
        output,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True),
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plain = {**read_config(output)}
    del plain["quantization_config"]
    decoded = write_checkpoint(tmp_path / "decoded", meant(load_tensors(output)), plain)
    for row in rows[:3]:
        expected = run(load_model(decoded), row)
        assert (run(model.float().eval(), row) - expected).abs().max() < 1e-5


def test_vision_towers_stay_and_are_named(tiny):
    model = open_model(tiny("glm4v_moe"))
    change = recode(model, "fp8").change
    assert change.quantization is not None
    ignored = set(change.quantization["modules_to_not_convert"])
    network = model.architecture.model
    linear = {
        name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)
    }
    vision = {name for name in linear if "visual" in name}
    assert vision
    assert vision <= ignored
    assert not [name for name in ignored if ".experts." in name]
