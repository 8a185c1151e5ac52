"""Checkpoints pruned into another weight format, against torch's formula and whole models."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.cli import main
from reap_stream.errors import UnsupportedError, UsageError, VerificationError
from reap_stream.model.opened import open_model
from reap_stream.planning import plan_pruning
from reap_stream.recoding.recode import recode
from reap_stream.scoring.scores_file import load_scores, save_scores
from reap_stream.settings import OutputSettings
from reap_stream.verifying import verify_directory
from tests import packed_checkpoints
from tests.builders import (
    add_mtp,
    load_tensors,
    quantise,
    read_config,
    save,
    tiny_config,
    tiny_model,
    write_checkpoint,
)
from tests.engine import prune_to, read_kept, run_settings
from tests.families import BY_ID
from tests.fp8_formula import encoded, meant
from tests.oracle import expected_tensors, load_model, prune_by_hand, run
from tests.packed_checkpoints import pack_gpt_oss
from tests.quantisers import PACKINGS

KEEP = 4
# Wide enough for FP8, and no multiple of 128 where it need not be.
WIDTHS = {
    "hidden_size": 256,
    "head_dim": 64,
    "moe_intermediate_size": 136,
    "intermediate_size": 200,
    "shared_expert_intermediate_size": 152,
}
MLA_WIDTHS = {
    "head_dim": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
GATED_DELTA = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
EXPERTS = r"\.experts\.\d+\.\w+\.weight$"
ATTENTION = r"self_attn\.[qkvo]_proj\.weight$"
MLP = r"mlp\.(shared_experts?\.)?(gate|up|down)_proj\.weight$"
# Family → further widths and the names of what its published FP8 checkpoints quantise.
FAMILIES = {
    "glm4_moe": ({}, [EXPERTS, ATTENTION, MLP]),
    "deepseek_v3": (
        MLA_WIDTHS,
        [EXPERTS, MLP, r"self_attn\.(q_[ab]|kv_b|o)_proj\.weight$", r"kv_a_proj_with_mqa\.weight$"],
    ),
    "qwen3_next": (
        GATED_DELTA,
        [EXPERTS, ATTENTION, MLP, r"linear_attn\.(in_proj_qkvz|out_proj)\.weight$"],
    ),
    "mixtral": ({}, [EXPERTS, ATTENTION]),
}
MODES = ["fp8", "fp8-channel"]


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """A family's bfloat16 checkpoint, wide enough to be quantised, once for each set of changes."""
    made = {}

    def make(family_id, dtype=torch.bfloat16, **changes):
        key = repr((family_id, dtype, sorted(changes.items())))
        if key not in made:
            family = BY_ID[family_id]
            model = tiny_model(family, **{**WIDTHS, **FAMILIES[family_id][0], **changes})
            made[key] = save(model.to(dtype), tmp_path_factory.mktemp(family_id))
        return made[key]

    return make


@pytest.fixture(scope="session")
def pruned_to(wide, calibration, tmp_path_factory):
    """A family's bfloat16 checkpoint, and what was pruned from it into a format, made once."""
    made = {}

    def make(family_id, mode):
        if (family_id, mode) not in made:
            output = tmp_path_factory.mktemp("pruned") / mode
            made[family_id, mode] = prune_to(
                output, wide(family_id), calibration, KEEP, weights=mode
            )
        return wide(family_id), made[family_id, mode]

    return make


def is_quantised(family_id):
    return re.compile("|".join(FAMILIES[family_id][1])).search


def assert_tensors(output, expected):
    found = load_tensors(output)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        mine, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(mine, theirs), name


def record(output):
    return json.loads((output / "reap" / "run.json").read_bytes())


# ---- what is written


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


@pytest.mark.parametrize("mode", [*MODES, "bf16"])
def test_all_experts_in_one_tensor(mode, tmp_path, calibration):
    family = BY_ID["qwen3_moe"]
    model = tiny_model(family, **WIDTHS)
    if mode != "bf16":
        model = model.to(torch.bfloat16)
    apart = save(model, tmp_path / "apart")
    fused = save(model, tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_tensors(fused)
    output = prune_to(tmp_path / "out", fused, calibration, KEEP, weights=mode)
    other = prune_to(tmp_path / "other", apart, calibration, KEEP, weights=mode)
    verify_directory(output, fused)
    if mode == "bf16":
        pruned = expected_tensors(load_tensors(fused), read_kept(output))
        assert_tensors(output, as_bfloat16(pruned))
    else:
        # Engines know FP8 experts by names of their own only.
        assert_tensors(output, load_tensors(other))


# ---- what it computes


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


# ---- other sources


def as_bfloat16(tensors):
    """Matrices but routers, rounded."""
    keep = re.compile(r"norm|bias|mlp\.gate\.weight|conv|A_log|dt_")
    return {n: t if keep.search(n) else t.to(torch.bfloat16) for n, t in tensors.items()}


@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
def test_bfloat16_is_what_the_source_decodes_to(scheme, wide, calibration, tmp_path):
    source, values = quantise(wide("glm4_moe", torch.float32), tmp_path, scheme)
    (source / "hf_quant_config.json").write_text('{"quantization": {"exclude_modules": []}}')
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights="bf16")
    pruned = expected_tensors(load_tensors(values), read_kept(output))
    assert_tensors(output, {name: t.to(torch.bfloat16) for name, t in pruned.items()})
    config = read_config(output)
    assert "quantization_config" not in config
    assert not (output / "hf_quant_config.json").exists()
    verify_directory(output, source)
    _, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_bfloat16_of_a_float32_checkpoint(wide, calibration, tmp_path):
    source = wide("glm4_moe", torch.float32)
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights="bf16")
    pruned = expected_tensors(load_tensors(source), read_kept(output))
    assert_tensors(output, as_bfloat16(pruned))
    assert read_config(output)["dtype"] == "bfloat16"
    verify_directory(output, source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_other_floats_are_encoded_exactly(mode, dtype, wide, calibration, tmp_path):
    source = wide("glm4_moe", dtype)
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights=mode)
    pruned = expected_tensors(load_tensors(source), read_kept(output))
    assert_tensors(output, encoded(pruned, mode, is_quantised("glm4_moe")))


@pytest.mark.parametrize(
    ("scheme", "mode"), [("block", "fp8-channel"), ("channel", "fp8"), ("tensor", "fp8")]
)
def test_fp8_of_another_scheme(scheme, mode, wide, calibration, tmp_path):
    source, values = quantise(wide("glm4_moe", torch.float32), tmp_path, scheme)
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights=mode)
    kept = read_kept(output)
    pruned = expected_tensors(load_tensors(source), kept)
    whole = expected_tensors(load_tensors(values), kept)
    expected = encoded(whole, mode, is_quantised("glm4_moe"))
    for name, tensor in pruned.items():
        if not name.endswith(("_scale", "_scale_inv")) and not is_quantised("glm4_moe")(name):
            expected[name] = tensor
    assert_tensors(output, expected)
    verify_directory(output, source)


@pytest.mark.parametrize(("scheme", "mode"), [("block", "fp8"), ("channel", "fp8-channel")])
def test_what_is_stored_so_already_keeps_its_bytes(scheme, mode, wide, calibration, tmp_path):
    source, _ = quantise(wide("glm4_moe", torch.float32), tmp_path, scheme)
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights=mode)
    assert_tensors(output, expected_tensors(load_tensors(source), read_kept(output)))
    assert read_config(output)["quantization_config"] == read_config(source)["quantization_config"]
    assert set(record(output)["weights"]) == {"kept"}


@pytest.mark.parametrize("style", ["nextn", "mtp"])
@pytest.mark.parametrize("mtp", ["match", "keep", "drop"])
def test_prediction_layers(mtp, style, wide, calibration, tmp_path):
    family_id = {"nextn": "glm4_moe", "mtp": "qwen3_next"}[style]
    source = add_mtp(wide(family_id), tmp_path / "source", style)
    tensors = {n: t.to(torch.bfloat16) for n, t in load_tensors(source).items()}
    source = write_checkpoint(tmp_path / "bf16", tensors, read_config(source))
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights="fp8", mtp=mtp)
    layers = read_config(source)["num_hidden_layers"]
    own = re.compile(rf"^mtp\.|layers\.{layers}\.")
    pruned = expected_tensors(tensors, read_kept(output), layers)
    if mtp == "drop":
        pruned = {name: tensor for name, tensor in pruned.items() if not own.search(name)}
    assert_tensors(output, encoded(pruned, "fp8", is_quantised(family_id)))
    ignored = read_config(output)["quantization_config"]["modules_to_not_convert"]
    joined = {"nextn": f"model.layers.{layers}.eh_proj", "mtp": "mtp.fc"}[style]
    assert (joined in ignored) == (mtp != "drop")
    verify_directory(output, source)


# ---- the same by other ways, and what is refused


@pytest.mark.parametrize("mode", [*MODES, "bf16"])
def test_compact_writes_and_plan_predicts_the_same(mode, wide, calibration, tmp_path):
    source = wide("glm4_moe", torch.float32)
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights=mode)
    scores = output / "reap" / "scores.safetensors"
    arguments = ["compact", str(source), "--scores", str(scores), "--weights", mode]
    again = tmp_path / "again"
    assert main([*arguments, "--keep", str(KEEP), "--output", str(again)]) == 0
    assert_tensors(again, load_tensors(output))
    assert read_config(again) == read_config(output)
    settings = OutputSettings(output=tmp_path / "none", keep=str(KEEP), weights=mode)
    (variant,) = plan_pruning(run_settings(source, calibration), settings).variants
    files = list(output.glob("*.safetensors"))
    assert variant.file_bytes == sum(path.stat().st_size for path in files)
    assert variant.bytes == sum(t.nbytes for t in load_tensors(output).values())
    parameters = sum(t.numel() for t in AutoModelForCausalLM.from_pretrained(source).parameters())
    assert variant.total_parameters < parameters


@pytest.mark.parametrize("mode", ["fp8", "bf16"])
def test_verify_finds_a_changed_scale_or_code(mode, wide, calibration, tmp_path):
    source = wide("glm4_moe", torch.float32)
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights=mode)
    name = "model.layers.1.mlp.experts.2.up_proj.weight" + ("_scale_inv" if mode == "fp8" else "")
    tensors = load_tensors(output)
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] *= 2
    for path in output.glob("*.safetensors"):
        path.unlink()
    write_checkpoint(tmp_path / "changed", tensors, {})
    (tmp_path / "changed" / "model.safetensors").rename(output / "model-00001-of-00001.safetensors")
    with pytest.raises(VerificationError, match=rf"{re.escape(name)}'.*computed from"):
        verify_directory(output, source)


def test_a_record_of_another_format_is_found_out(wide, calibration, tmp_path):
    source = wide("glm4_moe")
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights="fp8")
    path = output / "reap" / "run.json"
    for said, match in (("keep", "quantization_config"), ("int4", "settings.weights is 'int4'")):
        document = record(output)
        document["settings"]["weights"] = said
        path.write_text(json.dumps(document))
        with pytest.raises(VerificationError, match=match):
            verify_directory(output, source)


def test_families_without_names_for_single_experts_are_refused(tiny, calibration, tmp_path):
    with pytest.raises(UnsupportedError, match="all experts of a layer in one tensor"):
        prune_to(tmp_path / "out", tiny("granitemoe"), calibration, KEEP, weights="fp8")
    assert not list(tmp_path.iterdir())


def test_experts_alone_beside_weights_quantised_otherwise(wide, calibration, tmp_path):
    source, _ = quantise(wide("glm4_moe", torch.float32), tmp_path, "channel")
    with pytest.raises(
        UsageError, match=r"is quantised in another way.*leave out --fp8-experts-only"
    ):
        prune_to(tmp_path / "out", source, calibration, KEEP, weights="fp8", fp8_experts_only=True)
    with pytest.raises(UsageError, match="no meaning with --weights bf16"):
        OutputSettings(output=tmp_path, weights="bf16", fp8_experts_only=True)


def test_values_that_fp8_cannot_hold_are_named(wide, calibration, tmp_path, capsys):
    source = wide("glm4_moe")
    tensors = load_tensors(source)
    name = "model.layers.1.mlp.shared_experts.up_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 5] = float("inf")
    damaged = write_checkpoint(tmp_path / "damaged", tensors, read_config(source))
    scores = prune_to(tmp_path / "whole", source, calibration, KEEP) / "reap/scores.safetensors"
    moved = replace(load_scores(scores), model_fingerprint=open_checkpoint(damaged).fingerprint)
    save_scores(tmp_path / "scores.safetensors", moved)
    arguments = ["compact", str(damaged), "--output", str(tmp_path / "out"), "--keep", str(KEEP)]
    arguments += ["--scores", str(tmp_path / "scores.safetensors"), "--weights", "fp8"]
    assert main(arguments) == 1
    assert f"{name!r} holds values that are infinite" in capsys.readouterr().err


# ---- packed sources


@pytest.fixture(scope="session")
def packed(wide, tmp_path_factory):
    """Linear layers in a packed format, and the values they stand for."""
    made = {}

    def make(packing):
        if packing not in made:
            source, chosen = wide("glm4_moe", torch.float32), PACKINGS[packing]
            tensors, values = {}, {}
            for name, tensor in load_tensors(source).items():
                if not is_quantised("glm4_moe")(name) or tensor.shape[1] % 128:
                    tensors[name] = values[name] = tensor.to(torch.bfloat16)
                    continue
                stored, values[name] = chosen.quantise(tensor)
                if packing.startswith("int"):
                    # Integers have no zero below zero.
                    values[name] += 0.0
                module = name.removesuffix("weight")
                tensors |= {module + part: value for part, value in stored.items()}
            config = {**read_config(source), "quantization_config": chosen.settings}
            directory = tmp_path_factory.mktemp("packed")
            made[packing] = write_checkpoint(directory, tensors, config), values
        return made[packing]

    return make


@pytest.mark.parametrize(
    ("packing", "mode"), [*((name, "bf16") for name in PACKINGS), ("int4", "fp8"), ("nvfp4", "fp8")]
)
def test_packed_weights_become_what_they_stand_for(packing, mode, packed, calibration, tmp_path):
    source, values = packed(packing)
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights=mode)
    pruned = expected_tensors(values, read_kept(output))
    if mode == "fp8":
        expected = encoded(pruned, mode, is_quantised("glm4_moe"))
    else:
        expected = {name: tensor.to(torch.bfloat16) for name, tensor in pruned.items()}
    assert_tensors(output, expected)
    verify_directory(output, source)


def test_experts_of_gpt_oss_become_bfloat16(tiny, calibration, tmp_path):
    source, values = pack_gpt_oss(tiny("gpt_oss", **packed_checkpoints.WIDTHS), tmp_path)
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights="bf16")
    pruned = expected_tensors(load_tensors(values), read_kept(output))
    assert_tensors(output, {name: tensor.to(torch.bfloat16) for name, tensor in pruned.items()})
    assert "quantization_config" not in read_config(output)
    verify_directory(output, source)
    with pytest.raises(UnsupportedError, match="all experts of a layer in one tensor"):
        prune_to(tmp_path / "fp8", source, calibration, KEEP, weights="fp8")


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
