"""GPTQ, AWQ and INT8 checkpoints pruned from end to end, against the values they stand for."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from reap_stream.cli import main
from reap_stream.errors import UnsupportedError
from tests.builders import load_tensors, read_config, write_checkpoint
from tests.engine import prepare, prune_to, read_kept, read_scores, stream
from tests.families import BY_ID
from tests.oracle import Reference
from tests.oracle_pruning import assert_kept_bytes
from tests.word_checkpoints import LAYERS, WIDTHS, expected_settings, quantise

KEEP = 4
CASES = [
    ("glm4_moe", "gptq"),
    ("glm4_moe", "gptq-order"),
    ("glm4_moe", "awq"),
    ("qwen3_moe", "gptq-8"),
    ("qwen3_moe", "gptq-v2"),
    ("glm4_moe", "int8"),
]


@pytest.fixture(scope="module")
def stored_as(tiny, tmp_path_factory):
    """A checkpoint of a kind whose settings name experts of the last layer, and its meaning, once."""
    made = {}

    def make(family_id, kind):
        if (family_id, kind) not in made:
            directory = tmp_path_factory.mktemp(kind)
            source = tiny(family_id, **WIDTHS)
            made[family_id, kind] = quantise(source, directory, kind, LAYERS[family_id][-1])
        return made[family_id, kind]

    return make


@pytest.mark.parametrize(("family_id", "kind"), CASES)
def test_scores_follow_the_values_and_the_bytes_stay(
    family_id, kind, stored_as, calibration, rows, tmp_path
):
    layer = LAYERS[family_id][-1]
    stored, meant = stored_as(family_id, kind)
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
    name, stored_as, calibration, tmp_path, capsys
):
    whole, _ = stored_as("glm4_moe", "gptq")
    stored = shutil.copytree(whole, tmp_path / "stored")
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


def test_experts_that_settings_treat_differently_are_reported(stored_as, capsys):
    arguments = ["--keep", "4", "--json"]
    stored, _ = stored_as("glm4_moe", "awq")
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
def test_missing_parts_are_refused_before_any_work(kind, missing, stored_as, calibration, tmp_path):
    stored, _ = stored_as("glm4_moe", kind)
    tensors = load_tensors(stored)
    del tensors[missing]
    damaged = write_checkpoint(tmp_path / "damaged", tensors, read_config(stored))
    with pytest.raises(UnsupportedError, match=missing.rpartition(".")[0]):
        prepare(damaged, calibration)
    arguments = ["prune", str(damaged), "--output", str(tmp_path / "pruned"), "--keep", "4"]
    assert main([*arguments, "--calibration", calibration[0]]) == 2
    assert not (tmp_path / "pruned").exists()
