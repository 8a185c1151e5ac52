"""Next-token-prediction layers: pruned like the last MoE layer, or gone; config and tensors agree."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from reap_stream.cli import main
from reap_stream.errors import UnsupportedError, VerificationError
from reap_stream.model.opened import open_model
from reap_stream.verifying import verify_directory
from tests.builders import add_mtp, load_tensors, quantise, read_config, write_checkpoint
from tests.engine import prune_to, read_kept
from tests.families import BY_ID
from tests.oracle_pruning import assert_kept_bytes

KEEP = 4
STYLES = [("glm4_moe", "nextn"), ("deepseek_v3", "nextn"), ("qwen3_next", "mtp")]
EVERY = pytest.mark.parametrize(("family_id", "style"), STYLES)


@pytest.fixture(scope="session")
def with_mtp(tiny, tmp_path_factory):
    made = {}

    def make(family_id, style):
        if family_id not in made:
            made[family_id] = add_mtp(tiny(family_id), tmp_path_factory.mktemp("mtp"), style)
        return made[family_id]

    return make


def layers_of(source):
    return read_config(source)["num_hidden_layers"]


def mtp_names(source):
    prefixes = ("mtp.", f"model.layers.{layers_of(source)}.")
    return {name for name in load_tensors(source) if name.startswith(prefixes)}


@EVERY
def test_match_slices_it_like_the_last_moe_layer(family_id, style, with_mtp, calibration, tmp_path):
    source = with_mtp(family_id, style)
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP, mtp="match")
    kept, number = read_kept(output), layers_of(source)
    assert kept[number] == kept[number - 1]
    assert_kept_bytes(source, output, kept, number)
    experts = {name for name in mtp_names(output) if ".experts." in name}
    assert len(experts) == KEEP * 3
    config = read_config(output)
    assert config["num_nextn_predict_layers"] == 1
    assert config[BY_ID[family_id].count_key] == KEEP
    assert set(verify_kept(output, source)) == set(kept)


@EVERY
def test_drop_leaves_no_tensor_and_no_count(family_id, style, with_mtp, calibration, tmp_path):
    source = with_mtp(family_id, style)
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP, mtp="drop")
    assert mtp_names(source)
    assert not mtp_names(output)
    assert read_config(output)["num_nextn_predict_layers"] == 0
    kept = read_kept(output)
    assert layers_of(source) not in kept
    rest = {n: t for n, t in load_tensors(source).items() if n not in mtp_names(source)}
    without = write_checkpoint(tmp_path / "without", rest, read_config(source))
    assert_kept_bytes(without, output, kept)
    verify_kept(output, source)


@EVERY
def test_half_a_prediction_layer_is_found_by_verify(
    family_id, style, with_mtp, calibration, tmp_path
):
    source = with_mtp(family_id, style)
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP)
    tensors = load_tensors(output)
    lost = next(name for name in sorted(mtp_names(output)) if "experts.1." in name)
    del tensors[lost]
    damaged = write_checkpoint(tmp_path / "damaged", tensors, read_config(output))
    (damaged / "reap").mkdir()
    for path in (output / "reap").iterdir():
        (damaged / "reap" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(VerificationError, match=lost):
        verify_directory(damaged, source)


def test_the_choice_does_not_depend_on_the_prediction_layer(with_mtp, tiny, calibration, tmp_path):
    plain = prune_to(tmp_path / "plain", tiny("glm4_moe"), calibration, KEEP)
    other = prune_to(tmp_path / "other", with_mtp("glm4_moe", "nextn"), calibration, KEEP)
    found = read_kept(other)
    assert found.pop(3) is not None
    assert found == read_kept(plain)


@pytest.mark.parametrize("mtp", ["match", "drop"])
def test_transformers_loads_what_is_left(mtp, with_mtp, calibration, tmp_path):
    source = with_mtp("glm4_moe", "nextn")
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP, mtp=mtp)
    _, info = AutoModelForCausalLM.from_pretrained(
        output, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])
    assert bool(info["unexpected_keys"]) == (mtp == "match")


@EVERY
def test_keep_leaves_every_byte_and_says_so(
    family_id, style, with_mtp, calibration, tmp_path, capsys
):
    source = with_mtp(family_id, style)
    arguments = ["prune", str(source), "--output", str(tmp_path / "out"), "--keep", str(KEEP)]
    arguments += ["--calibration", calibration[0], "--mtp", "keep", "--device", "cpu"]
    assert main(arguments) == 0
    assert "llama.cpp's converter and vLLM's speculation" in capsys.readouterr().err
    output = tmp_path / "out"
    before, after = load_tensors(source), load_tensors(output)
    assert mtp_names(output) == mtp_names(source)
    assert all(torch.equal(after[name], before[name]) for name in mtp_names(source))
    assert layers_of(source) not in read_kept(output)
    verify_kept(output, source)
    assert open_model(output).tensor_map.mtp_uneven == {layers_of(source): 8}


def test_a_layer_that_was_kept_whole_is_not_pruned_with_the_rest(with_mtp, calibration, tmp_path):
    once = prune_to(tmp_path / "once", with_mtp("glm4_moe", "nextn"), calibration, 6, mtp="keep")
    for mtp in (None, "score", "match"):
        with pytest.raises(UnsupportedError, match=r"layer 3 has 8 experts .* 6, .*--mtp drop"):
            prune_to(tmp_path / "twice", once, calibration, KEEP, mtp=mtp)
    for mtp in ("keep", "drop"):
        output = prune_to(tmp_path / mtp, once, calibration, KEEP, mtp=mtp)
        assert bool(mtp_names(output)) == (mtp == "keep")
        verify_kept(output, once)


@pytest.mark.parametrize("mtp", ["match", "drop"])
def test_it_may_be_stored_without_the_scales_of_its_twin(mtp, tiny, calibration, tmp_path):
    quantised = quantise(tiny("glm4_moe"), tmp_path, "block", block=24)[0]
    added = add_mtp(quantised, tmp_path / "added", "nextn")
    number = layers_of(added)
    plain = {
        name: tensor
        for name, tensor in load_tensors(added).items()
        if not (f"layers.{number}." in name and "_scale" in name)
    }
    source = write_checkpoint(tmp_path / "source", plain, read_config(added))
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP, mtp=mtp)
    assert (number in verify_kept(output, source)) == (mtp == "match")


def test_it_may_not_lack_weights_of_its_twin(with_mtp, tmp_path):
    tensors = load_tensors(with_mtp("glm4_moe", "nextn"))
    left = {name: t for name, t in tensors.items() if "layers.3.mlp.gate." not in name}
    source = write_checkpoint(tmp_path / "source", left, read_config(with_mtp("glm4_moe", "nextn")))
    with pytest.raises(UnsupportedError, match=r"layer 3 has experts but no 'mlp\.gate"):
        open_model(source)


def test_decoder_layers_are_not_taken_for_it(with_mtp, tmp_path):
    source = with_mtp("glm4_moe", "nextn")
    config = {**read_config(source), "num_hidden_layers": 2}
    shorter = write_checkpoint(tmp_path / "shorter", load_tensors(source), config)
    with pytest.raises(UnsupportedError, match="layer 2 lies behind the 2 decoder layers"):
        open_model(shorter)


def test_decoder_layers_are_not_taken_for_it_where_config_speaks_of_none(tiny, tmp_path):
    source = tiny("qwen2_moe")
    config = {**read_config(source), "num_hidden_layers": 2}
    config["layer_types"] = config["layer_types"][:2]
    shorter = write_checkpoint(tmp_path / "shorter", load_tensors(source), config)
    with pytest.raises(UnsupportedError, match=r"layer 2 lies behind .*correct num_hidden_layers"):
        open_model(shorter)


def test_more_of_them_than_the_config_says_are_refused(tiny, tmp_path):
    source = add_mtp(tiny("glm4_moe"), tmp_path / "two", "nextn", 2)
    config = {**read_config(source), "num_nextn_predict_layers": 1}
    other = write_checkpoint(tmp_path / "other", load_tensors(source), config)
    with pytest.raises(UnsupportedError, match=r"speaks of 1 .* holds 2 layers .*layer 3"):
        open_model(other)


@pytest.mark.parametrize("style", ["alone", "fused"])
def test_its_experts_may_be_stored_otherwise_than_the_decoders(style, tiny, calibration, tmp_path):
    """Qwen3.5 publishes fused experts, and prediction layers whose experts are alone."""
    source = add_mtp(tiny("qwen3_next"), tmp_path / "source", "mtp")
    tensors = load_tensors(source)
    prefix = "mtp." if style == "fused" else "model."
    for name in [name for name in tensors if name.startswith(prefix) and "experts.0." in name]:
        stem = name.split("experts.0.")
        experts = [tensors.pop(f"{stem[0]}experts.{n}.{stem[1]}") for n in range(8)]
        tensors[f"{stem[0]}experts.{stem[1]}"] = torch.stack(experts)
    for name in [name for name in tensors if name.endswith("experts.gate_proj.weight")]:
        both = [tensors.pop(name), tensors.pop(name.replace("gate_proj", "up_proj"))]
        tensors[name.replace("gate_proj.weight", "gate_up_proj")] = torch.cat(both, 1)
        down = name.replace("gate_proj", "down_proj")
        tensors[down.removesuffix(".weight")] = tensors.pop(down)
    mixed = write_checkpoint(tmp_path / "mixed", tensors, read_config(source))
    output = prune_to(tmp_path / "out", mixed, calibration, KEEP)
    plain = prune_to(tmp_path / "plain", source, calibration, KEEP)
    assert read_kept(output) == read_kept(plain)
    assert_kept_bytes(mixed, output, read_kept(output), 4)


def test_dropping_one_of_which_only_the_config_speaks(tiny, calibration, tmp_path):
    config = {**read_config(tiny("glm4_moe")), "num_nextn_predict_layers": 1}
    source = write_checkpoint(tmp_path / "source", load_tensors(tiny("glm4_moe")), config)
    for mtp, count in (("drop", 0), ("match", 1)):
        output = prune_to(tmp_path / mtp, source, calibration, KEEP, mtp=mtp)
        assert read_config(output)["num_nextn_predict_layers"] == count
        verify_kept(output, source)


def verify_kept(output, source):
    report = verify_directory(output, source)
    kept = read_kept(output)
    assert (report.keep, report.layers) == (KEEP, len(kept))
    assert report.mtp_layers == len(kept.keys() - range(layers_of(source)))
    return kept
