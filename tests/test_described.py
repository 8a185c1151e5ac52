"""Checkpoints described from config.json and index alone, against real ones."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from reap_stream.cli import main
from reap_stream.errors import UnsupportedError
from tests.builders import add_mtp, load_tensors, quantise
from tests.families import FAMILIES
from tests.planning import INDEX, config_only, described_tensors, plan, tensors_of

NO_MTP = {"num_nextn_predict_layers": 0}
# Cerebras prunes this model to 120, 112 and 96 experts and calls the results 268B, 252B and 218B.
GLM_46 = {
    "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True,
    "head_dim": 128, "hidden_size": 5120, "intermediate_size": 12288, "use_qk_norm": True,
    "moe_intermediate_size": 1536, "num_attention_heads": 96, "num_key_value_heads": 8,
    "n_group": 1, "topk_group": 1, "n_routed_experts": 160, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "num_hidden_layers": 92,
    "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "vocab_size": 151552,
    "dtype": "bfloat16", "max_position_embeddings": 202752,
}  # fmt: skip
DESCRIBED = [pytest.param(family.id, torch.float32, id=family.id) for family in FAMILIES]
DESCRIBED += [
    pytest.param(name, torch.bfloat16, id=f"{name}-bfloat16")
    for name in ("glm4_moe", "qwen3_moe", "hunyuan_v1_moe", "nemotron_h")
]


@pytest.mark.parametrize(("family_id", "dtype"), DESCRIBED)
def test_a_config_describes_the_tensors_that_transformers_saves(family_id, dtype, tiny, tmp_path):
    source = tiny(family_id, dtype=dtype)
    described, notes = described_tensors(config_only(source, tmp_path, num_nextn_predict_layers=0))
    found = tensors_of(source)
    assert notes == ()
    assert {n: spec[1] for n, spec in described.items()} == {n: s[1] for n, s in found.items()}
    # `model.to(dtype)` also casts what transformers keeps in float32 when it loads and trains.
    strict = {name for name in found if described[name][0] != found[name][0]}
    assert all(described[name][0] == "F32" for name in strict)
    assert all("bias" in name or "gate" in name for name in strict)


@pytest.mark.parametrize(
    "family_id", ["glm4_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "granitemoe"]
)
@pytest.mark.parametrize("index", [False, True], ids=["config", "index"])
def test_without_weights_the_plan_is_the_same(family_id, index, tiny, tmp_path):
    source = tiny(family_id)
    bare = config_only(source, tmp_path, index=index, **({} if index else NO_MTP))
    full, estimate = plan(source, keep="6,4"), plan(bare, keep="6,4")
    assert estimate.facts.estimated
    assert not full.facts.estimated
    assert estimate.notes == ()
    assert estimate.facts.bytes == full.facts.bytes
    assert estimate.facts.largest_layer_bytes == full.facts.largest_layer_bytes
    assert estimate.facts.total_parameters == full.facts.total_parameters
    for mine, theirs in zip(estimate.variants, full.variants, strict=True):
        assert mine.bytes == theirs.bytes
        assert mine.total_parameters == theirs.total_parameters
        assert mine.active_parameters == theirs.active_parameters


SCHEMES = [
    ("block", torch.float32, 24),
    ("channel", torch.bfloat16, 0),
    ("tensor", torch.float32, 0),
]


@pytest.mark.parametrize(("scheme", "scale_dtype", "block"), SCHEMES)
@pytest.mark.parametrize("index", [False, True], ids=["config", "index"])
def test_fp8_is_described_from_settings_and_from_the_index(
    scheme, scale_dtype, block, index, tiny, tmp_path
):
    source = tiny("qwen3_moe", dtype=torch.bfloat16)
    stored = quantise(source, tmp_path / "source", scheme, scale_dtype, block)[0]
    described, notes = described_tensors(config_only(stored, tmp_path / "bare", index=index))
    assert notes == ()
    found = tensors_of(stored)
    assert any(dtype == "F8_E4M3" for dtype, _, _ in found.values())
    for specs in (described, found):
        for name, (dtype, shape, nbytes) in specs.items():
            if math.prod(shape) == 1:
                specs[name] = (dtype, (), nbytes)
    assert described == found


@pytest.mark.parametrize(
    ("settings", "excluded"),
    [
        ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.self_attn"]}, "self_attn"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["q_proj"]}, "q_proj"),
        ({"ignore": ["re:.*self_attn.*"]}, "self_attn"),
        ({"ignore": ["model.layers.0.self_attn.q_proj"]}, "layers.0.self_attn.q_proj"),
        ({"ignore": [], "targets": [r"re:.*\.experts\..*"]}, "self_attn"),
    ],
)  # fmt: skip
def test_modules_that_the_settings_leave_out_stay_plain(settings, excluded, tiny, tmp_path):
    weights = {"type": "float", "num_bits": 8, "strategy": "channel"}
    targets = settings.get("targets", ["Linear"])
    group = {"weights": weights, "targets": targets}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"0": group}, **settings}
    source = tiny("qwen3_moe", dtype=torch.bfloat16)
    described, _ = described_tensors(
        config_only(source, tmp_path, quantization_config=quantization)
    )
    first = {name: spec[0] for name, spec in described.items() if ".layers.0." in name}
    quantised = {name for name, dtype in first.items() if dtype == "F8_E4M3"}
    assert quantised
    assert not any(excluded in name for name in quantised)
    assert any(".experts." in name for name in quantised)
    assert described["lm_head.weight"][0] == "BF16"
    assert first["model.layers.0.mlp.gate.weight"] == "BF16"


@pytest.mark.parametrize(
    ("family_id", "style"), [("glm4_moe", "nextn"), ("deepseek_v3", "nextn"), ("qwen3_next", "mtp")]
)
def test_mtp_layers_are_described_from_the_index(family_id, style, tiny, tmp_path):
    source = add_mtp(tiny(family_id), tmp_path / "source", style)
    bare = config_only(source, tmp_path / "bare", index=True)
    described, notes = described_tensors(bare)
    assert notes == ()
    assert described == tensors_of(source)
    full, estimate = plan(source, keep="4"), plan(bare, keep="4")
    assert estimate.facts == replace(full.facts, estimated=True)
    assert estimate.variants[0].bytes == full.variants[0].bytes
    assert estimate.variants[0].mtp_parameters == full.variants[0].mtp_parameters


def test_mtp_parameters_stand_beside_the_totals(tiny, tmp_path):
    plain_source = tiny("glm4_moe")
    source = add_mtp(plain_source, tmp_path / "source", "nextn")
    planned = plan(source, keep="4")
    tensors = load_tensors(source)
    mtp_tensors = {name: t for name, t in tensors.items() if name.startswith("model.layers.3.")}
    assert planned.facts.mtp_layers == 1
    assert planned.facts.mtp_parameters == sum(t.numel() for t in mtp_tensors.values())
    assert planned.facts.total_parameters == plan(plain_source, keep="4").facts.total_parameters
    gone = sum(
        tensor.numel() if ".experts." in name else tensor.numel() // 2
        for name, tensor in mtp_tensors.items()
        if any(f".experts.{expert}." in name for expert in range(4, 8)) or ".mlp.gate." in name
    )
    assert planned.variants[0].mtp_parameters == planned.facts.mtp_parameters - gone


def test_fp8_mtp_layers_are_described_from_the_index(tiny, tmp_path):
    source = add_mtp(tiny("qwen3_moe", dtype=torch.bfloat16), tmp_path / "mtp", "nextn")
    stored = quantise(source, tmp_path / "source", "block", torch.float32, 24)[0]
    described, notes = described_tensors(config_only(stored, tmp_path / "bare", index=True))
    assert notes == ()
    assert described == tensors_of(stored)


def test_an_mtp_layer_is_assumed_and_said_so_without_an_index(tiny, tmp_path):
    source = add_mtp(tiny("glm4_moe"), tmp_path / "source", "nextn")
    described, notes = described_tensors(config_only(source, tmp_path / "bare"))
    assert any("num_nextn_predict_layers" in note for note in notes)
    assert described == tensors_of(source)


def test_an_index_of_another_total_is_reported(tiny, tmp_path):
    bare = config_only(tiny("mixtral"), tmp_path, index=True)
    document = json.loads((bare / INDEX).read_text())
    described = document["metadata"]["total_size"]
    for factor, noted in ((1.005, False), (1.02, True), (0.5, True)):
        document["metadata"]["total_size"] = int(described * factor)
        (bare / INDEX).write_text(json.dumps(document))
        assert any("GB of tensors" in note for note in plan(bare, keep="4").notes) is noted


def test_names_that_only_the_index_has_are_reported(tiny, tmp_path):
    bare = config_only(tiny("mixtral"), tmp_path, index=True)
    document = json.loads((bare / INDEX).read_text())
    document["weight_map"]["model.odd.tensor"] = "model-00001-of-00001.safetensors"
    (bare / INDEX).write_text(json.dumps(document))
    notes = plan(bare, keep="4").notes
    assert any("1 tensors of unknown shape" in n and "model.odd.tensor" in n for n in notes)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "mxfp4"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"0": {"weights": {"type": "int", "num_bits": 4, "strategy": "group"}}}},
    ],
)  # fmt: skip
def test_other_formats_are_not_guessed(settings, tiny, tmp_path):
    bare = config_only(tiny("qwen3_moe"), tmp_path, quantization_config=settings)
    with pytest.raises(UnsupportedError, match=r"config\.json.*quantised.*safetensors shards"):
        plan(bare, keep="4")


def test_quantisation_settings_that_are_none_are_refused(tiny, tmp_path):
    bare = config_only(tiny("qwen3_moe"), tmp_path, quantization_config="fp8")
    with pytest.raises(UnsupportedError, match=r"config\.json"):
        plan(bare, keep="4")


def test_fused_fp8_experts_are_not_guessed(tiny, tmp_path):
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    bare = config_only(tiny("gpt_oss"), tmp_path, quantization_config=settings)
    with pytest.raises(UnsupportedError, match="all experts in one quantised tensor"):
        plan(bare, keep="4")


def test_a_half_downloaded_checkpoint_is_no_config(tiny, tmp_path, capsys):
    source = tiny("mixtral", max_shard_size="60KB")
    shutil.copytree(source, tmp_path / "half")
    max((tmp_path / "half").glob("model-*.safetensors")).unlink()
    assert main(["plan", str(tmp_path / "half"), "--keep", "4"]) == 2
    assert "model-" in capsys.readouterr().err


def test_glm_46_from_its_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GLM_46))
    planned = plan(tmp_path, sparsity="0.25,0.3,0.4", compute_dtype="bfloat16")
    facts = planned.facts
    assert (facts.num_layers, facts.moe_layers, facts.mtp_layers) == (92, 89, 1)
    hidden, width, layers = 5120, 1536, 89
    expert = 3 * hidden * width
    attention = hidden * 128 * (96 + 8 + 8 + 96) + 128 * (96 + 8 + 8) + 2 * 128
    dense = 3 * hidden * 12288
    rest = 92 * (attention + 2 * hidden) + 3 * dense + layers * expert + hidden
    embeddings = 2 * 151552 * hidden
    total = rest + embeddings + layers * 160 * (expert + hidden)
    assert facts.total_parameters == total == 352_797_814_784
    # "32B active" leaves out embedding and head.
    active = total - layers * 152 * expert
    assert facts.active_parameters == active
    assert (active - embeddings) // 10**9 == 32
    assert [v.keep for v in planned.variants] == [120, 112, 96]
    assert [v.total_parameters // 10**9 for v in planned.variants] == [268, 251, 218]
    assert [round(v.total_parameters / 1e9) for v in planned.variants] == [269, 252, 218]
    # The published checkpoint counts 357B with its MTP layer, which shares embedding and head.
    assert round((total + facts.mtp_parameters - embeddings) / 1e9) == 357
    for variant in planned.variants:
        assert abs(variant.bytes - 2 * (variant.total_parameters + variant.mtp_parameters)) < 10**6
        assert not any("divide" in warning for warning in variant.warnings)
