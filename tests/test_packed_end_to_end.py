"""Packed checkpoints pruned from end to end, against the values they stand for in float32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from reap_stream.cli import main
from reap_stream.demands import measure_demands
from reap_stream.errors import UnsupportedError
from reap_stream.inspection import mtp_parameters
from reap_stream.model.feeds import layer_feeds
from reap_stream.model.opened import check_forward, open_model
from reap_stream.scoring.scores_file import load_scores, save_scores
from tests.builders import add_mtp, load_tensors, read_config, write_checkpoint
from tests.engine import prepare, prune_to, read_kept, read_scores, stream
from tests.families import BY_ID
from tests.oracle import Reference
from tests.oracle_pruning import assert_kept_bytes
from tests.packed_checkpoints import (
    WIDTHS,
    everywhere,
    experts_only,
    mixed,
    pack,
    pack_gpt_oss,
)

KEEP = 4
CASES = {
    "kimi": ("deepseek_v3", experts_only("int4")),
    "int4-zero-points": ("qwen3_moe", everywhere("int4-zero-points")),
    "int8-channel": ("qwen3_moe", everywhere("int8-channel")),
    "nvfp4": ("qwen3_moe", everywhere("nvfp4")),
    "nvfp4-modelopt": ("qwen3_moe", experts_only("nvfp4-modelopt")),
    "mxfp4": ("glm4_moe", everywhere("mxfp4")),
    "mxfp4-deepseek": ("glm4_moe", mixed("mxfp4-deepseek", "fp8-e8m0", 9)),
    "mxfp8": ("qwen3_moe", everywhere("mxfp8")),
    "mixed": ("glm4_moe", mixed("int4", "fp8-block", 2)),
    "gpt-oss": ("gpt_oss", None),
}


@pytest.fixture(scope="session")
def packed(tiny, tmp_path_factory):
    """A packed checkpoint and its float32 meaning, once for each case."""
    made = {}

    def make(case):
        if case not in made:
            family, choose = CASES[case]
            directory = tmp_path_factory.mktemp("packed")
            if choose is None:
                source = tiny(family, hidden_size=64, intermediate_size=32)
                made[case] = pack_gpt_oss(source, directory)
            else:
                made[case] = pack(tiny(family, **WIDTHS), directory, choose)
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES)
def test_scores_follow_the_values_and_the_bytes_stay(case, packed, calibration, rows, tmp_path):
    stored, meant = packed(case)
    oracle = Reference(meant, rows, torch.float32)
    ready = prepare(stored, calibration)
    streamed = stream(ready, tmp_path)
    for got, expected in zip(streamed.states, oracle.states, strict=True):
        for mine, theirs in zip(got, expected, strict=True):
            assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()

    output = prune_to(tmp_path / "pruned", stored, calibration, KEEP)
    kept, scores = read_kept(output), read_scores(output)
    for layer in oracle.calls:
        sums = scores[f"layers.{layer}.gate_norm_sum"].sum(axis=0)
        np.testing.assert_allclose(sums, oracle.sums(layer).gate_norm_sum, rtol=1e-6)
    assert kept == oracle.kept(KEEP, groups=BY_ID[CASES[case][0]].values.get("n_group", 1))
    assert_kept_bytes(stored, output, kept)
    assert read_config(output)["quantization_config"] == read_config(stored)["quantization_config"]
    assert main(["verify", str(output), "--source", str(stored)]) == 0


@pytest.mark.parametrize("case", ["kimi", "gpt-oss"])
def test_few_experts_in_memory_give_the_same_scores(case, packed, calibration, tmp_path):
    stored, _ = packed(case)
    ready = prepare(stored, calibration)
    (tmp_path / "few").mkdir()
    whole = stream(ready, tmp_path)
    few = stream(ready, tmp_path / "few", expert_slots=3)
    for layer, stats in whole.stats.items():
        np.testing.assert_array_equal(stats.gate_norm_sum, few.stats[layer].gate_norm_sum)


@pytest.mark.parametrize("case", ["kimi", "gpt-oss"])
def test_experts_are_held_packed(case, packed):
    """Memory is planned for the bytes on disk and one decoded expert, not for a decoded layer."""
    stored, meant = packed(case)
    held = []
    for directory in (stored, meant):
        model = open_model(directory, dtype=torch.float32)
        feeds = layer_feeds(model.architecture, model.tensor_map)
        demands = measure_demands(model.architecture, feeds, torch.float32, longest_row=8)
        held.append(demands.slot * demands.num_experts + demands.fused)
    assert held[0] < held[1] / 5


def pruned_twice(packed, case, calibration, directory):
    """A packed checkpoint and the values it stands for, pruned to the same experts."""
    stored, meant = packed(case)
    output = prune_to(directory / "pruned", stored, calibration, KEEP)
    plain = prune_to(directory / "plain", meant, calibration, KEEP)
    assert read_kept(output) == read_kept(plain)
    return load_tensors(output), load_tensors(plain)


def test_gpt_oss_is_read_back_by_transformers(packed, calibration, tmp_path):
    tensors, meant = pruned_twice(packed, "gpt-oss", calibration, tmp_path)
    blocks = [name for name in tensors if name.endswith("_blocks")]
    assert len(blocks) == 6
    for name in blocks:
        stem = name.removesuffix("_blocks")
        values = convert_moe_packed_tensors(
            tensors[name], tensors[f"{stem}_scales"], dtype=torch.float32
        )
        assert torch.equal(values, meant[stem])


@pytest.mark.parametrize(
    ("case", "packing"), [("kimi", "pack-quantized"), ("nvfp4", "nvfp4-pack-quantized")]
)
def test_pruned_experts_are_read_back_by_compressed_tensors(
    case, packing, packed, calibration, tmp_path
):
    base = pytest.importorskip("compressed_tensors.compressors.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    tensors, meant = pruned_twice(packed, case, calibration, tmp_path)
    weights = read_config(tmp_path / "pruned")["quantization_config"]["config_groups"]["group_0"]
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**weights["weights"])
    )
    compressor = base.BaseCompressor.get_value_from_registry(packing)
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith("weight_packed")}
    assert sum(".experts." in module for module in modules) >= 2 * 3 * KEEP
    for module in modules:
        parts = {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{module}.")
        }
        values = compressor.decompress(parts, scheme)["weight"]
        assert torch.equal(values, meant[f"{module}.weight"].to(torch.bfloat16))


def unknown(tensors):
    """Experts' codes and scales under names of no known format."""

    def renamed(name):
        return name.replace("weight_packed", "W_q").replace("weight_scale", "meta_scale")

    return {
        renamed(name) if ".experts." in name else name: tensor for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("leaf", ["up_proj.rotation", "input_scale"])
def test_an_unknown_companion_is_carried(leaf, packed, calibration, tmp_path):
    stored, _ = packed("kimi")
    tensors = load_tensors(stored)
    for expert in range(8):
        for layer in (1, 2):
            module = f"model.layers.{layer}.mlp.experts.{expert}"
            tensors[f"{module}.{leaf}"] = torch.full((3,), float(expert))
    source = write_checkpoint(tmp_path / "source", tensors, read_config(stored))
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP)
    assert_kept_bytes(source, output, read_kept(output))
    found = load_tensors(output)
    for layer, kept in read_kept(output).items():
        for slot, expert in enumerate(kept):
            module = f"model.layers.{layer}.mlp.experts.{slot}"
            assert found[f"{module}.{leaf}"].tolist() == [expert] * 3
    assert main(["verify", str(output), "--source", str(source)]) == 0


def test_an_unknown_format_refuses_the_forward_but_not_compact(packed, calibration, tmp_path):
    stored, _ = packed("kimi")
    source = write_checkpoint(
        tmp_path / "source", unknown(load_tensors(stored)), read_config(stored)
    )
    with pytest.raises(UnsupportedError, match=r"experts\.0\..*no decoder.*W_q"):
        prepare(source, calibration)
    output = tmp_path / "pruned"
    arguments = ["prune", str(source), "--output", str(output), "--keep", "4"]
    assert main([*arguments, "--calibration", calibration[0]]) == 2
    assert not output.exists()

    known = prune_to(tmp_path / "known", stored, calibration, KEEP)
    scores = load_scores(known / "reap" / "scores.safetensors")
    fingerprint = open_model(source).checkpoint.fingerprint
    save_scores(tmp_path / "scores", replace(scores, model_fingerprint=fingerprint))
    arguments = ["compact", str(source), "--scores", str(tmp_path / "scores"), "--keep", "4"]
    assert main([*arguments, "--output", str(output)]) == 0
    assert read_kept(output) == read_kept(known)
    assert_kept_bytes(source, output, read_kept(output))
    assert main(["verify", str(output), "--source", str(source)]) == 0


@pytest.mark.parametrize("missing", ["weight_packed", "weight_scale", "weight_shape"])
def test_experts_of_which_one_lacks_a_part_are_refused(missing, packed, tmp_path):
    stored, _ = packed("kimi")
    tensors = load_tensors(stored)
    del tensors[f"model.layers.1.mlp.experts.3.up_proj.{missing}"]
    source = write_checkpoint(tmp_path / "source", tensors, read_config(stored))
    with pytest.raises(UnsupportedError, match=r"experts\.3\.up_proj|7 of 8|fed by 7"):
        check_forward(open_model(source))


def test_a_prediction_layer_is_pruned_with_the_rest(tiny, calibration, tmp_path):
    with_mtp = add_mtp(tiny("glm4_moe", **WIDTHS), tmp_path / "bf16", "nextn")
    stored, meant = pack(with_mtp, tmp_path, everywhere("int4"))
    counted = [mtp_parameters(open_model(directory)) for directory in (stored, meant)]
    assert counted[0] == counted[1]
    output = prune_to(tmp_path / "pruned", stored, calibration, KEEP)
    kept = read_kept(output)
    assert set(kept) == {1, 2, 3}
    assert_kept_bytes(stored, output, kept)
    assert main(["verify", str(output), "--source", str(stored)]) == 0
