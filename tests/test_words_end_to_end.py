"""GPTQ, AWQ and INT8 checkpoints pruned from end to end, against the values they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reap_stream.cli import main
from reap_stream.errors import UnsupportedError
from tests.builders import load_tensors, read_config, write_checkpoint
from tests.engine import prepare, prune_to, read_kept, read_scores, stream
from tests.families import BY_ID, NUM_EXPERTS
from tests.oracle import Reference, assert_kept_bytes
from tests.words import pack_awq, pack_gptq

KEEP = 4
GROUP = 32
WIDTHS = {"hidden_size": 96, "moe_intermediate_size": 64, "intermediate_size": 128}
LAYERS = {"glm4_moe": (1, 2), "qwen3_moe": (0, 1, 2)}


def quantised_rows(weight, bits, group_of, rng):
    """Codes [N, K], zero points [N, G] and scales [N, G] that take each group's range."""
    groups = int(group_of.max()) + 1
    zeros = torch.from_numpy(rng.integers(0, 1 << bits, (len(weight), groups)))
    scale = torch.empty(len(weight), groups)
    for group in range(groups):
        scale[:, group] = weight[:, group_of == group].abs().amax(dim=1) / (1 << (bits - 1))
    scale = scale.half().float()
    wide, middle = scale[:, group_of], zeros[:, group_of]
    codes = ((weight / wide).round().long() + middle).clamp(0, (1 << bits) - 1)
    return codes, zeros, scale, (codes - middle) * wide


def store(kind, weight, rng):
    """The tensors of a weight by their leaf, and the values they stand for."""
    columns = weight.shape[1]
    bits = 8 if kind == "gptq-8" else 4
    group_of = torch.arange(columns) // GROUP
    if kind == "gptq-order":
        group_of = group_of[torch.from_numpy(rng.permutation(columns))]
    if kind == "int8":
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        codes = (weight / scale).round().to(torch.int8)
        return {"weight": codes, "weight_scale": scale}, codes * scale
    codes, zeros, scale, values = quantised_rows(weight, bits, group_of, rng)
    if kind == "awq":
        return pack_awq(codes, zeros, scale.half()), values
    offset = 0 if kind == "gptq-v2" else 1
    return pack_gptq(codes, zeros, scale.half(), group_of.int(), bits, offset), values


def module_of(layer, expert, projection="up_proj"):
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}"


def settings_of(kind, layer):
    """What the publishers of such checkpoints write, with entries that name experts."""
    named = [module_of(layer, expert) for expert in range(NUM_EXPERTS)]
    if kind == "awq":
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "modules_to_not_convert": ["mlp.gate", "lm_head", module_of(layer, 1)],
        }
    if kind == "int8":
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": {"targets": named, "weights": {"num_bits": 8}}},
            "ignore": ["lm_head", r"re:.*mlp\.gate$"],
        }
    return {
        "quant_method": "gptq",
        "bits": 8 if kind == "gptq-8" else 4,
        "group_size": GROUP,
        "desc_act": kind == "gptq-order",
        "sym": False,
        "checkpoint_format": "gptq_v2" if kind == "gptq-v2" else "gptq",
        "dynamic": {rf"+:{name.replace('.', chr(92) + '.')}$": {"bits": 4} for name in named},
    }


def expected_settings(settings, kept, layer):
    """The settings after pruning, by replacing names in their text."""
    names = {module_of(layer, old): module_of(layer, new) for new, old in enumerate(kept[layer])}
    if settings["quant_method"] == "awq":
        lost = module_of(layer, 1)
        kept_names = [n for n in settings["modules_to_not_convert"] if n != lost]
        renamed = [names[lost]] if lost in names else []
        return {**settings, "modules_to_not_convert": kept_names + renamed}
    if settings["quant_method"] == "gptq":
        escaped = {old.replace(".", r"\."): new.replace(".", r"\.") for old, new in names.items()}
        dynamic = {
            key.replace(old, new): value
            for key, value in settings["dynamic"].items()
            for old, new in escaped.items()
            if old in key
        }
        return {**settings, "dynamic": dynamic}
    group = {**settings["config_groups"]["group_0"], "targets": list(names.values())}
    return {**settings, "config_groups": {"group_0": group}}


def quantise(source: Path, directory: Path, kind: str, layer: int) -> tuple[Path, Path]:
    """A checkpoint of that kind, all linears but router and lm_head, and what it means."""
    rng = np.random.default_rng(1)
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, tensor in load_tensors(source).items():
        # One projection stays as it is: layers of such checkpoints are seldom all alike.
        if not name.endswith("_proj.weight") or name.endswith("layers.0.self_attn.k_proj.weight"):
            stored[name] = meant[name] = tensor
            continue
        parts, meant[name] = store(kind, tensor.float(), rng)
        module = name.removesuffix(".weight")
        stored.update({f"{module}.{leaf}": part for leaf, part in parts.items()})
        if "experts" in name and kind != "int8":
            stored[f"{module}.input_scale"] = torch.tensor(float(len(stored)))
    config = read_config(source)
    settings = settings_of(kind, layer)
    made = write_checkpoint(directory / kind, stored, {**config, "quantization_config": settings})
    (made / "quantize_config.json").write_text(json.dumps(settings))
    return made, write_checkpoint(directory / "meant", meant, config)


CASES = [
    ("glm4_moe", "gptq"),
    ("glm4_moe", "gptq-order"),
    ("glm4_moe", "awq"),
    ("qwen3_moe", "gptq-8"),
    ("qwen3_moe", "gptq-v2"),
    ("qwen3_moe", "int8"),
]


@pytest.mark.parametrize(("family_id", "kind"), CASES)
def test_scores_follow_the_values_and_the_bytes_stay(
    family_id: str, kind: str, tiny: Any, calibration: Any, rows: Any, tmp_path: Path
) -> None:
    layer = LAYERS[family_id][-1]
    stored, meant = quantise(tiny(family_id, **WIDTHS), tmp_path, kind, layer)
    oracle = Reference(meant, rows, torch.float32)
    streamed = stream(prepare(stored, calibration), tmp_path)
    for got, expected in zip(streamed.states, oracle.states, strict=True):
        for mine, theirs in zip(got, expected, strict=True):
            assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()

    output = prune_to(tmp_path / "pruned", stored, calibration, KEEP)
    kept, scores = read_kept(output), read_scores(output)
    for moe_layer in oracle.calls:
        sums = scores[f"layers.{moe_layer}.gate_norm_sum"].sum(axis=0)
        np.testing.assert_allclose(sums, oracle.sums(moe_layer).gate_norm_sum, rtol=1e-6)
    assert kept == oracle.kept(KEEP, groups=BY_ID[family_id].values.get("n_group", 1))
    assert_kept_bytes(stored, output, kept)
    before = read_config(stored)["quantization_config"]
    after = expected_settings(before, kept, layer)
    assert read_config(output)["quantization_config"] == after
    assert json.loads((output / "quantize_config.json").read_text()) == after
    assert main(["verify", str(output), "--source", str(stored)]) == 0


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_settings_that_cannot_be_renumbered_are_refused_before_any_work(
    name, tiny, calibration, tmp_path, capsys
):
    stored, _ = quantise(tiny("glm4_moe", **WIDTHS), tmp_path, "gptq", 1)
    settings = {"dynamic": {r"-:.*(q_proj|experts\.7\.up_proj)$": {}}}
    document = {**read_config(stored), "quantization_config": settings}
    written = document if name == "config.json" else settings
    (stored / name).write_text(json.dumps(written))
    arguments = ["prune", str(stored), "--output", str(tmp_path / "pruned"), "--keep", "4"]
    assert main([*arguments, "--calibration", calibration[0]]) == 2
    message = capsys.readouterr().err
    assert name in message
    assert "names experts by number" in message
    assert not (tmp_path / "pruned").exists()


def test_experts_that_settings_treat_differently_are_reported(tiny, tmp_path, capsys):
    arguments = ["--keep", "4", "--json"]
    stored, _ = quantise(tiny("glm4_moe", **WIDTHS), tmp_path, "awq", 2)
    assert main(["plan", str(stored), *arguments]) == 0
    (variant,) = json.loads(capsys.readouterr().out)["variants"]
    mixed = [text for text in variant["warnings"] if "do not treat the experts" in text]
    assert len(mixed) == 1
    assert "experts of layers 2 alike" in mixed[0]
    assert main(["plan", str(stored), "--keep", "8", "--json"]) == 0
    assert "do not treat" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("gptq", "model.layers.1.mlp.experts.0.down_proj.qzeros"),
        ("awq", "model.layers.2.mlp.experts.5.gate_proj.scales"),
        ("awq", "model.layers.0.self_attn.q_proj.qzeros"),
        ("int8", "model.layers.1.mlp.shared_experts.up_proj.weight_scale"),
    ],
)
def test_missing_parts_are_refused_before_any_work(kind, missing, tiny, calibration, tmp_path):
    stored, _ = quantise(tiny("glm4_moe", **WIDTHS), tmp_path, kind, 1)
    tensors = load_tensors(stored)
    del tensors[missing]
    damaged = write_checkpoint(tmp_path / "damaged", tensors, read_config(stored))
    with pytest.raises(UnsupportedError, match=missing.rpartition(".")[0]):
        prepare(damaged, calibration)
    arguments = ["prune", str(damaged), "--output", str(tmp_path / "pruned"), "--keep", "4"]
    assert main([*arguments, "--calibration", calibration[0]]) == 2
    assert not (tmp_path / "pruned").exists()
