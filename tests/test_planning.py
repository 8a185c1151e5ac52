"""`plan`: totals, bytes, memory and warnings, against what is really written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.cli import main
from reap_stream.errors import UsageError
from reap_stream.memory import plan_memory
from tests.builders import add_mtp, load_tensors, quantise, read_config, write_checkpoint
from tests.engine import prune_to
from tests.families import BY_ID, FAMILIES, NUM_EXPERTS
from tests.oracle import experts_modules, load_model
from tests.planning import INDEX, plan

INTERFACE_KEYS = {
    "architecture", "num_layers", "moe_layers", "mtp_layers", "num_experts", "experts_per_token",
    "total_parameters", "active_parameters", "mtp_parameters", "bytes", "largest_layer_bytes",
    "variants",
}  # fmt: skip
VARIANT_KEYS = {
    "sparsity", "keep", "total_parameters", "active_parameters", "bytes", "peak_host_bytes",
    "peak_device_bytes", "warnings",
}  # fmt: skip


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
    assert planned.calibration.memory_budget_bytes == 1000
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


def test_experts_of_one_tensor_are_all_held(tiny):
    planned = plan(tiny("gpt_oss"), keep="4", memory=2**33)
    assert planned.calibration.expert_slots == NUM_EXPERTS
    assert not any("read again" in warning for warning in planned.variants[0].warnings)


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
