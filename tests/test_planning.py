"""The plan against what transformers counts, what prune writes, and what published models are."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.cli import main
from reap_stream.errors import UnsupportedError, UsageError
from reap_stream.memory import plan_memory
from reap_stream.model.described import describe_model
from reap_stream.planning import plan_pruning
from reap_stream.settings import OutputSettings
from tests.builders import add_mtp, load_tensors, quantise, read_config, write_checkpoint
from tests.engine import prune_to, run_settings
from tests.families import BY_ID, FAMILIES, NUM_EXPERTS
from tests.oracle import experts_modules, load_model

INDEX = "model.safetensors.index.json"
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
INTERFACE_KEYS = {
    "architecture", "num_layers", "moe_layers", "mtp_layers", "num_experts", "experts_per_token",
    "total_parameters", "active_parameters", "mtp_parameters", "bytes", "largest_layer_bytes",
    "variants",
}  # fmt: skip
VARIANT_KEYS = {
    "sparsity", "keep", "total_parameters", "active_parameters", "bytes", "peak_host_bytes",
    "peak_device_bytes", "warnings",
}  # fmt: skip


def plan(model, keep=None, *, sparsity=None, **options):
    output = OutputSettings(output=model / "never", keep=keep, sparsity=sparsity)
    return plan_pruning(run_settings(model, ("unopened",), **options), output)


def config_only(source, directory, *, index=False, **changes):
    """The checkpoint's config.json alone, or with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**read_config(source), **changes}
    (directory / "config.json").write_text(json.dumps(config))
    if index:
        tensors = load_tensors(source)
        weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
        total = sum(tensor.nbytes for tensor in tensors.values())
        document = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(document))
    return directory


def tensors_of(directory):
    found = open_checkpoint(directory).tensors
    return {name: (ref.dtype, ref.shape, ref.nbytes) for name, ref in found.items()}


def described_tensors(directory):
    described = describe_model(directory)
    found = described.model.checkpoint.tensors
    tensors = {name: (ref.dtype, ref.shape, ref.nbytes) for name, ref in found.items()}
    return tensors, described.notes


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_totals_are_those_of_transformers(family, tiny):
    directory = tiny(family.id)
    planned = plan(directory, keep="8,4")
    model = load_model(directory)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(
        parameter.numel()
        for module in experts_modules(model).values()
        for parameter in module.parameters(recurse=False)
    )
    # What identity experts have, nothing reads.
    unread = sum(
        module.gate_up_proj[NUM_EXPERTS:].numel()
        for module in experts_modules(model).values()
        if hasattr(module, "zero_expert_num")
    )
    total, experts = total - unread, experts - unread
    assert planned.facts.total_parameters == planned.variants[0].total_parameters == total
    top_k = planned.facts.experts_per_token
    assert planned.facts.active_parameters == total - experts // NUM_EXPERTS * (NUM_EXPERTS - top_k)
    assert planned.facts.bytes == sum(tensor.nbytes for tensor in load_tensors(directory).values())


@pytest.mark.parametrize("family_id", ["glm4_moe", "qwen3_moe", "gpt_oss", "mixtral", "jamba"])
def test_a_smaller_model_has_the_planned_parameters(family_id, tiny):
    planned = plan(tiny(family_id), keep="4").variants[0]
    smaller = AutoModelForCausalLM.from_pretrained(
        tiny(family_id, **{BY_ID[family_id].count_key: 4}), dtype=torch.float32
    )
    assert planned.total_parameters == sum(p.numel() for p in smaller.parameters())


def fp8(scheme, scale_dtype, block):
    def make(source, directory):
        return quantise(source, directory, scheme, scale_dtype, block)[0]

    return make


def mtp(style):
    return lambda source, directory: add_mtp(source, directory, style)


def plain(source, directory):
    return source


@pytest.mark.parametrize(
    ("family_id", "make"),
    [
        pytest.param("glm4_moe", plain, id="per-expert"),
        pytest.param("gpt_oss", plain, id="fused"),
        pytest.param("glm4_moe", fp8("channel", torch.float32, 0), id="channel"),
        pytest.param("deepseek_v3", fp8("block", torch.float32, 24), id="block"),
        pytest.param("glm4_moe", mtp("nextn"), id="nextn"),
        pytest.param("qwen3_next", mtp("mtp"), id="mtp"),
    ],
)
def test_bytes_are_those_that_prune_writes(family_id, make, tiny, calibration, tmp_path):
    source = make(tiny(family_id), tmp_path / "source")
    variants = plan(source, keep="6,4").variants
    output = prune_to(tmp_path / "out", source, calibration, "6,4")
    for variant in variants:
        written = output / f"keep-{variant.keep}"
        assert variant.bytes == open_checkpoint(written).nbytes
        index = json.loads((written / INDEX).read_text())
        assert variant.bytes == index["metadata"]["total_size"]
        shards = list(written.glob("*.safetensors"))
        assert variant.file_bytes == sum(shard.stat().st_size for shard in shards)
        assert variant.shards == len(shards)


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


def test_json_has_the_keys_of_the_interface(tiny, capsys):
    assert main(["plan", str(tiny("glm4_moe")), "--sparsity", "0.25,0.5", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == ""
    assert document.keys() >= INTERFACE_KEYS
    assert document["architecture"] == "Glm4MoeForCausalLM"
    assert [v["keep"] for v in document["variants"]] == [6, 4]
    assert [v["sparsity"] for v in document["variants"]] == [0.25, 0.5]
    for variant in document["variants"]:
        assert variant.keys() >= VARIANT_KEYS
        assert all(isinstance(warning, str) for warning in variant["warnings"])
        numbers = VARIANT_KEYS - {"warnings", "sparsity"}
        assert all(type(variant[key]) is int for key in numbers)


def test_the_table_says_the_same(tiny, capsys):
    assert main(["plan", str(tiny("glm4_moe")), "--keep", "6,5"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    rows = [line.split()[0] for line in captured.out.splitlines() if line.strip()]
    assert {"6", "5"} <= set(rows)
    assert "warning (keep 5): 5 experts do not divide by 2, 4, 8" in captured.out
    assert "warning: config.json speaks of 1 next-token-prediction" in captured.out


@pytest.mark.parametrize(
    ("family_id", "options", "message"),
    [
        ("glm4_moe", ["--keep", "1"], "fewer than the 2"),
        ("deepseek_v3", ["--keep", "2"], "each needs 2"),
        ("deepseek_v3", ["--keep", "5"], "do not divide into the router's 2 groups"),
        ("glm4_moe", ["--sparsity", "1.0"], "out of range"),
        ("glm4_moe", ["--keep", "4", "--samples", "0"], "at least 1"),
        ("glm4_moe", ["--keep", "4", "--batch-tokens", "0"], "at least 1"),
        ("glm4_moe", ["--keep", "4", "--memory", "much"], "not a number of bytes"),
    ],
)
def test_what_prune_refuses_plan_refuses(family_id, options, message, tiny, capsys):
    assert main(["plan", str(tiny(family_id)), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_without_config_is_refused(tmp_path, capsys):
    assert main(["plan", str(tmp_path), "--keep", "4"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_targets_are_required(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(tmp_path)])
    assert stopped.value.code == 2


def test_rounding_to_groups_is_said(tiny):
    variant = plan(tiny("deepseek_v3"), sparsity="0.3").variants[0]
    assert variant.keep == 6
    assert not any("rounded" in warning for warning in variant.warnings)
    variant = plan(tiny("deepseek_v3"), sparsity="0.4").variants[0]
    assert variant.keep == 6
    assert any("would keep 5" in w and "rounded up to 6" in w for w in variant.warnings)


def test_a_budget_that_is_too_small_is_a_warning_with_the_least(tiny):
    directory = tiny("qwen3_moe")
    planned = plan(directory, keep="4", memory=1000)
    variant = planned.variants[0]
    assert not planned.calibration.fits
    assert any(w.startswith("prune would refuse: the memory budget") for w in variant.warnings)
    enough = plan(directory, keep="4", memory=variant.peak_host_bytes + 2**26)
    assert enough.calibration.fits
    assert not any("refuse" in warning for warning in enough.variants[0].warnings)


def test_peak_memory_holds_experts_and_hidden_states(tiny):
    directory = tiny("qwen3_moe")
    tokens = {"samples": 1000, "sequence_length": 1000}
    few = plan(directory, keep="4", samples=1, memory=2**33)
    many = plan(directory, keep="4", memory=2**33, **tokens)
    hidden = 10**6 * 32 * 4
    assert many.calibration.hidden_state_bytes == hidden
    assert not many.calibration.hidden_states_in_file
    assert many.calibration.expert_slots == NUM_EXPERTS
    assert many.variants[0].peak_host_bytes > few.facts.largest_layer_bytes + hidden
    assert many.variants[0].peak_device_bytes == 0
    growth = many.variants[0].peak_host_bytes - few.variants[0].peak_host_bytes
    assert abs(growth - hidden) < 2**26


def test_few_slots_and_a_file_for_hidden_states_are_said(tiny, monkeypatch):
    def tight(demands, **options):
        return replace(plan_memory(demands, **options), expert_slots=3, spill=True)

    monkeypatch.setattr("reap_stream.preparation.plan_memory", tight)
    planned = plan(tiny("qwen3_moe"), keep="4")
    warnings = planned.variants[0].warnings
    assert any("holds 3 of 8 experts" in warning for warning in warnings)
    assert any("go to a file" in warning for warning in warnings)
    # The file, the snapshot, and the snapshot that replaces it.
    hidden = 3 * planned.calibration.hidden_state_bytes
    assert planned.disk_bytes == planned.variants[0].file_bytes + hidden


def test_weights_that_cannot_be_decoded_are_a_warning(tiny, tmp_path):
    source = tiny("qwen3_moe", dtype=torch.bfloat16)
    stored = quantise(source, tmp_path, "channel", torch.float32, 0)[0]
    tensors = load_tensors(stored)
    del tensors["model.layers.0.self_attn.q_proj.weight_scale"]
    damaged = write_checkpoint(tmp_path / "damaged", tensors, read_config(stored))
    warnings = plan(damaged, keep="4").variants[0].warnings
    assert any("1 weights cannot be decoded" in w and "q_proj" in w for w in warnings)


def test_an_unknown_device_is_refused(tiny):
    with pytest.raises(UsageError, match="--device meta"):
        plan(tiny("qwen3_moe"), keep="4", device="meta")
