"""Other formats of weights from other sources: floats, FP8, packed, fused, prediction layers."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from reap_stream.errors import UnsupportedError
from reap_stream.verifying import verify_directory
from tests import packed_checkpoints
from tests.builders import (
    add_mtp,
    load_tensors,
    quantise,
    read_config,
    save,
    tiny_model,
    write_checkpoint,
)
from tests.engine import prune_to, read_kept
from tests.families import BY_ID
from tests.fp8_formula import encoded
from tests.oracle_pruning import expected_tensors
from tests.packed_checkpoints import pack_gpt_oss
from tests.quantisers import PACKINGS
from tests.recoding import (
    KEEP,
    MODES,
    WIDTHS,
    as_bfloat16,
    assert_tensors,
    is_quantised,
    record,
)


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


@pytest.fixture(scope="module")
def stored_as(wide, tmp_path_factory):
    """A checkpoint in an FP8 scheme, and a float32 one of its values, made once."""
    made = {}

    def make(scheme):
        if scheme not in made:
            source = wide("glm4_moe", torch.float32)
            made[scheme] = quantise(source, tmp_path_factory.mktemp("stored"), scheme)
        return made[scheme]

    return make


@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
def test_bfloat16_is_what_the_source_decodes_to(scheme, stored_as, calibration, tmp_path):
    stored, values = stored_as(scheme)
    source = shutil.copytree(stored, tmp_path / "source")
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


def test_bfloat16_of_a_float32_checkpoint(pruned_to):
    source, output = pruned_to("glm4_moe", "bf16", torch.float32)
    pruned = expected_tensors(load_tensors(source), read_kept(output))
    assert_tensors(output, as_bfloat16(pruned))
    assert read_config(output)["dtype"] == "bfloat16"
    verify_directory(output, source)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("fp8", torch.float32), ("fp8-channel", torch.float32), ("fp8", torch.float16)],
    ids=str,
)
def test_other_floats_are_encoded_exactly(mode, dtype, pruned_to):
    source, output = pruned_to("glm4_moe", mode, dtype)
    pruned = expected_tensors(load_tensors(source), read_kept(output))
    assert_tensors(output, encoded(pruned, mode, is_quantised("glm4_moe")))


@pytest.mark.parametrize(
    ("scheme", "mode"), [("block", "fp8-channel"), ("channel", "fp8"), ("tensor", "fp8")]
)
def test_fp8_of_another_scheme(scheme, mode, stored_as, calibration, tmp_path):
    source, values = stored_as(scheme)
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
def test_what_is_stored_so_already_keeps_its_bytes(scheme, mode, stored_as, calibration, tmp_path):
    source, _ = stored_as(scheme)
    output = prune_to(tmp_path / "out", source, calibration, KEEP, weights=mode)
    assert_tensors(output, expected_tensors(load_tensors(source), read_kept(output)))
    assert read_config(output)["quantization_config"] == read_config(source)["quantization_config"]
    assert set(record(output)["weights"]) == {"kept"}


@pytest.mark.parametrize(
    ("mtp", "style"),
    [("match", "nextn"), ("match", "mtp"), ("keep", "mtp"), ("drop", "nextn")],
)
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


@pytest.fixture(scope="module")
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
