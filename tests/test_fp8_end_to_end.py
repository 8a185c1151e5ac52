"""FP8 checkpoints pruned from end to end, against the values they stand for in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reap_stream.cli import main
from reap_stream.errors import UnsupportedError, VerificationError
from reap_stream.verifying import verify_directory
from tests.builders import add_mtp, load_tensors, quantise, read_config, write_checkpoint
from tests.engine import prepare, prune_to, read_kept, read_scores, stream
from tests.families import BY_ID
from tests.oracle import Reference
from tests.oracle_pruning import assert_kept_bytes

KEEP = 4
# No multiple of 128, so the last block of rows and of columns is cut short.
ODD_WIDTHS = {"hidden_size": 160, "moe_intermediate_size": 136, "intermediate_size": 200}
CASES = [
    pytest.param("deepseek_v3", "block", torch.float32, 128, ODD_WIDTHS, id="block"),
    pytest.param("qwen3_moe", "block", torch.float32, 128, {}, id="block-larger-than-tensor"),
    pytest.param("glm4_moe", "block", torch.float32, 24, {}, id="block-of-config"),
    pytest.param("glm4_moe", "block", torch.bfloat16, 128, ODD_WIDTHS, id="block-bfloat16-scales"),
    pytest.param("glm4_moe", "channel", torch.float32, 0, ODD_WIDTHS, id="channel"),
    pytest.param("glm4_moe", "channel", torch.bfloat16, 0, {}, id="channel-bfloat16-scales"),
    pytest.param("minimax_m2", "channel", torch.float32, 0, {}, id="channel-other-names"),
    pytest.param("qwen2_moe", "tensor", torch.float32, 0, ODD_WIDTHS, id="tensor"),
]


@pytest.fixture(scope="session")
def quantised(tiny, tmp_path_factory):
    """An FP8 checkpoint and its float32 meaning, once for each case."""
    made = {}

    def make(family_id, scheme, scale_dtype, block, changes):
        key = repr((family_id, scheme, scale_dtype, block, changes))
        if key not in made:
            source = tiny(family_id, **changes)
            directory = tmp_path_factory.mktemp("fp8")
            made[key] = quantise(source, directory, scheme, scale_dtype, block)
        return made[key]

    return make


@pytest.mark.parametrize(("family_id", "scheme", "scale_dtype", "block", "changes"), CASES)
def test_scores_follow_the_values_and_the_bytes_stay(
    family_id, scheme, scale_dtype, block, changes, quantised, calibration, rows, tmp_path
):
    stored, meant = quantised(family_id, scheme, scale_dtype, block, changes)
    if family_id != "minimax_m2":
        assert any("experts" in name and "scale" in name for name in load_tensors(stored))
    oracle = Reference(meant, rows, torch.float32)
    streamed = stream(prepare(stored, calibration), tmp_path)
    for got, expected in zip(streamed.states, oracle.states, strict=True):
        for mine, theirs in zip(got, expected, strict=True):
            assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()

    output = prune_to(tmp_path / "pruned", stored, calibration, KEEP)
    kept, scores = read_kept(output), read_scores(output)
    for layer in oracle.calls:
        sums = scores[f"layers.{layer}.gate_norm_sum"].sum(axis=0)
        np.testing.assert_allclose(sums, oracle.sums(layer).gate_norm_sum, rtol=1e-6)
    assert kept == oracle.kept(KEEP, groups=BY_ID[family_id].groups)
    assert_kept_bytes(stored, output, kept)
    assert read_config(output)["quantization_config"] == read_config(stored)["quantization_config"]
    assert main(["verify", str(output), "--source", str(stored)]) == 0


def test_bfloat16_forward_is_that_of_the_decoded_bfloat16_model(
    quantised, calibration, rows, tmp_path
):
    stored, meant = quantised("glm4_moe", "channel", torch.float32, 0, ODD_WIDTHS)
    oracle = Reference(meant, rows, torch.bfloat16)
    streamed = stream(prepare(stored, calibration, compute_dtype="bfloat16"), tmp_path)
    exact = Reference(meant, rows, torch.float32)
    for got, rounded, right in zip(streamed.states, oracle.states, exact.states, strict=True):
        for mine, theirs, truth in zip(got, rounded, right, strict=True):
            assert mine.dtype == torch.bfloat16
            # No worse than transformers' own bfloat16 is, with some room for luck.
            error = (mine.float() - truth).norm()
            assert error < 2 * (theirs.float() - truth).norm()


def test_like_the_published_glm_checkpoint_with_its_prediction_layer(tiny, calibration, tmp_path):
    with_mtp = add_mtp(tiny("glm4_moe"), tmp_path / "bf16", "nextn")
    stored, _ = quantise(with_mtp, tmp_path, "channel")
    output = prune_to(tmp_path / "pruned", stored, calibration, KEEP)
    kept = read_kept(output)
    assert set(kept) == {1, 2, 3}
    assert_kept_bytes(stored, output, kept)
    verify_directory(output, stored)


def test_swapped_scales_are_found_by_verify(quantised, calibration, tmp_path):
    stored, _ = quantised("glm4_moe", "channel", torch.float32, 0, ODD_WIDTHS)
    output = prune_to(tmp_path / "pruned", stored, calibration, KEEP)
    tensors = load_tensors(output)
    one, two = (f"model.layers.1.mlp.experts.{n}.up_proj.weight_scale" for n in (0, 1))
    tensors[one], tensors[two] = tensors[two].clone(), tensors[one].clone()
    for path in output.glob("*.safetensors"):
        path.unlink()
    write_checkpoint(tmp_path / "swapped", tensors, {})
    (tmp_path / "swapped" / "model.safetensors").rename(output / "model-00001-of-00001.safetensors")
    with pytest.raises(VerificationError, match=r"experts\.0\.up_proj\.weight_scale"):
        verify_directory(output, stored)


MISSING = [
    "model.layers.1.mlp.experts.0.down_proj.weight_scale",
    "model.layers.2.mlp.experts.5.gate_proj.weight_scale",
    "model.layers.0.self_attn.q_proj.weight_scale",
    "model.layers.1.mlp.shared_experts.up_proj.weight_scale",
]


@pytest.mark.parametrize("missing", MISSING)
def test_missing_scale_is_refused_before_any_work(
    missing, quantised, calibration, tmp_path, capsys
):
    stored, _ = quantised("glm4_moe", "channel", torch.float32, 0, ODD_WIDTHS)
    tensors = load_tensors(stored)
    del tensors[missing]
    damaged = write_checkpoint(tmp_path / "damaged", tensors, read_config(stored))
    weight = missing.removesuffix("_scale")
    with pytest.raises(UnsupportedError, match=weight) as caught:
        prepare(damaged, calibration)
    assert "model.safetensors" in str(caught.value)
    arguments = ["prune", str(damaged), "--output", str(tmp_path / "pruned"), "--keep", "4"]
    assert main([*arguments, "--calibration", calibration[0]]) == 2
    assert weight in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_scale_of_another_shape_is_refused(quantised, calibration, tmp_path):
    stored, _ = quantised("glm4_moe", "channel", torch.float32, 0, ODD_WIDTHS)
    tensors = load_tensors(stored)
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale"
    tensors[name] = tensors[name][:-1]
    damaged = write_checkpoint(tmp_path / "damaged", tensors, read_config(stored))
    with pytest.raises(UnsupportedError, match=r"experts\.3\.up_proj\.weight_scale.*\[135, 1\]"):
        prepare(damaged, calibration)
