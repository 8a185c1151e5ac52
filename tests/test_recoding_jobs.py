"""Other formats of weights by all commands, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.cli import main
from reap_stream.errors import UnsupportedError, UsageError, VerificationError
from reap_stream.planning import plan_pruning
from reap_stream.scoring.scores_file import load_scores, save_scores
from reap_stream.settings import OutputSettings
from reap_stream.verifying import verify_directory
from tests.builders import (
    load_tensors,
    quantise,
    read_config,
    write_checkpoint,
)
from tests.engine import prune_to, run_settings
from tests.recoding import (
    KEEP,
    MODES,
    assert_tensors,
    record,
)


@pytest.mark.parametrize("mode", [*MODES, "bf16"])
def test_compact_writes_and_plan_predicts_the_same(mode, pruned_to, calibration, tmp_path):
    source, output = pruned_to("glm4_moe", mode, torch.float32)
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
def test_verify_finds_a_changed_scale_or_code(mode, pruned_to, tmp_path):
    source, whole = pruned_to("glm4_moe", mode, torch.float32)
    output = shutil.copytree(whole, tmp_path / "out")
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


def test_a_record_of_another_format_is_found_out(pruned_to, tmp_path):
    source, whole = pruned_to("glm4_moe", "fp8")
    output = shutil.copytree(whole, tmp_path / "out")
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


def test_values_that_fp8_cannot_hold_are_named(pruned_to, tmp_path, capsys):
    source, pruned = pruned_to("glm4_moe", "fp8")
    tensors = load_tensors(source)
    name = "model.layers.1.mlp.shared_experts.up_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 5] = float("inf")
    damaged = write_checkpoint(tmp_path / "damaged", tensors, read_config(source))
    scores = load_scores(pruned / "reap" / "scores.safetensors")
    moved = replace(scores, model_fingerprint=open_checkpoint(damaged).fingerprint)
    save_scores(tmp_path / "scores.safetensors", moved)
    arguments = ["compact", str(damaged), "--output", str(tmp_path / "out"), "--keep", str(KEEP)]
    arguments += ["--scores", str(tmp_path / "scores.safetensors"), "--weights", "fp8"]
    assert main(arguments) == 1
    assert f"{name!r} holds values that are infinite" in capsys.readouterr().err
