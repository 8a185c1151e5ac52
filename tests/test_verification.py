"""Verification of weights: any byte, any expert and any tensor that is not as it must be."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from reap_stream import verification
from reap_stream.checkpoint import compare
from reap_stream.checkpoint.header import read_header
from reap_stream.errors import CheckpointError, UnsupportedError
from reap_stream.verification import SourceFacts, verify
from tests import verified
from tests.pruning_source import (
    COUNT_PATHS,
    MTP_LAYER,
    SIDE_FILES,
    assert_same,
    load_shards,
    make_source,
    pruned_arrays,
    write_pruned,
)
from tests.verified import KEEP, edit_json, refuse, rewrite

source, kept, pruned = verified.source, verified.kept, verified.pruned

# ---- sound checkpoints


def test_what_was_written_passes(pruned, source, kept):
    seen = []
    report = verify(
        pruned, source.directory, source.facts(), lambda done, total: seen.append((done, total))
    )
    expected = pruned_arrays(source.arrays, source.roles, kept)
    assert_same(load_shards(pruned), expected)
    nbytes = sum(array.nbytes for array in expected.values())
    assert (report.tensors, report.nbytes) == (len(expected), nbytes)
    assert (report.keep, report.layers, report.side_files) == (KEEP, 3, 2)
    assert seen[-1] == (nbytes, nbytes)
    assert seen == sorted(seen)


def test_files_beside_the_weights(pruned, kept):
    assert (pruned / "tokenizer.json").read_bytes() == SIDE_FILES["tokenizer.json"]
    assert (pruned / "templates/chat.jinja").read_bytes() == SIDE_FILES["templates/chat.jinja"]
    assert (pruned / "README.md").read_bytes() == b"# pruned"
    # An earlier pruning's record says nothing about this one.
    assert not (pruned / "reap/run.json").exists()
    config = json.loads((pruned / "config.json").read_text())
    assert config["n_routed_experts"] == KEEP
    assert config["quantization_config"]["ignore"] == [
        "lm_head", "model.layers.1.mlp.experts.0.up_proj"
    ]  # fmt: skip
    assert config["num_nextn_predict_layers"] == 1
    assert not list(pruned.rglob(".*"))


def test_half_written_files_of_a_killed_attempt_do_not_stay(source, kept, tmp_path):
    stray = tmp_path / "pruned" / "reap" / ".kept_experts.json.partial"
    stray.parent.mkdir(parents=True)
    stray.write_text("{")
    write_pruned(source, tmp_path / "pruned", kept)
    assert not stray.exists()


def test_a_checkpoint_without_its_mtp_layers_passes(source, kept, tmp_path):
    dropped = source.mtp_tensors
    write_pruned(source, tmp_path / "pruned", kept, dropped)
    report = verify(tmp_path / "pruned", source.directory, source.facts(dropped))
    assert report.layers == 2
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    refuse(tmp_path / "pruned", source, rf"kept must map layers 1, 2, {MTP_LAYER} to experts")


def test_a_pruned_checkpoint_can_be_pruned_again(source, kept, pruned, tmp_path):
    again = make_source(tmp_path / "unused")
    arrays = pruned_arrays(source.arrays, source.roles, kept)
    roles = {name: again.roles[name] for name in arrays}
    second = type(again)(pruned, arrays, roles, KEEP)
    write_pruned(second, tmp_path / "twice", second.choose(2, seed=5))
    report = verify(tmp_path / "twice", pruned, second.facts())
    assert report.keep == 2


def test_renumbered_quantisation_files_pass(source, kept, tmp_path):
    def quantised(expert):
        return {"exclude_modules": [f"model.layers.1.mlp.experts.{expert}.up_proj"]}

    path = source.directory / "hf_quant_config.json"
    path.write_text(json.dumps(quantised(5)))
    pruned = tmp_path / "pruned"
    write_pruned(source, pruned, kept)
    assert json.loads((pruned / "hf_quant_config.json").read_text()) == quantised(2)
    verify(pruned, source.directory, source.facts())
    (pruned / "hf_quant_config.json").write_bytes(path.read_bytes())
    refuse(pruned, source, r"hf_quant_config\.json: byte 1 is not the source's")


# ---- damaged weights


@pytest.mark.parametrize("buffer_nbytes", [8 << 20, 7])
def test_any_flipped_byte_is_found_and_named(pruned, source, kept, monkeypatch, buffer_nbytes):
    monkeypatch.setattr(compare, "_BUFFER_NBYTES", buffer_nbytes)
    rng = np.random.default_rng(0)
    refs = [
        ref for path in pruned.glob("*.safetensors") for ref in read_header(path).tensors.values()
    ]
    for ref in (ref for ref in refs if ref.nbytes):
        raw = bytearray(ref.file.read_bytes())
        offset = int(rng.integers(ref.nbytes))
        right = raw[ref.offset + offset]
        wrong = right ^ 0x41
        for later in range(offset, ref.nbytes):
            raw[ref.offset + later] ^= 0x41
        sound = ref.file.read_bytes()
        ref.file.write_bytes(raw)
        message = refuse(pruned, source, "faults: 1;")
        assert str(ref.file) in message
        assert f"tensor {ref.name!r}: byte {offset} of {ref.nbytes} " in message
        assert f"(byte {ref.offset + offset} of the file)" in message
        assert f"is {wrong:#04x}, {right:#04x} in " in message
        ref.file.write_bytes(sound)
    verify(pruned, source.directory, source.facts())


@pytest.mark.parametrize("suffix", ["up_proj.weight", "up_proj.weight_scale"])
def test_swapped_experts_are_found(pruned, source, kept, suffix):
    left, right = (f"model.layers.2.mlp.experts.{slot}.{suffix}" for slot in (0, 1))
    origins = [f"model.layers.2.mlp.experts.{kept[2][slot]}.{suffix}" for slot in (0, 1)]

    def swap(arrays):
        arrays[left], arrays[right] = arrays[right], arrays[left]

    rewrite(pruned, swap)
    message = refuse(pruned, source, "faults: 2;")
    for name, origin in zip((left, right), origins, strict=True):
        assert re.search(rf"'{name}': byte .* in '{origin}'", message)


def test_another_choice_than_the_recorded_one_is_found(pruned, source, kept):
    other = next(e for e in range(source.num_experts) if e not in kept[2])
    changed = sorted([*kept[2][1:], other])
    edit_json(pruned / "reap/kept_experts.json", lambda d: d["kept"].update({"2": changed}))
    refuse(pruned, source, r"tensor 'model\.layers\.2\.mlp\.experts\.0\.up_proj\.weight': byte")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda arrays: arrays.pop("model.layers.1.mlp.experts.2.up_proj.weight_scale"),
            r"tensor 'model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight_scale' is missing",
        ),
        (
            lambda arrays: arrays.update(surplus=np.zeros(3)),
            r"00001-of-00001\.safetensors: tensor 'surplus' does not belong",
        ),
        (
            lambda arrays: arrays.update(
                {"model.embed_tokens.weight": arrays["model.embed_tokens.weight"].view(np.int16)}
            ),
            r"tensor 'model\.embed_tokens\.weight' is I16 \[7, 4\], F16 \[7, 4\] expected",
        ),
        (
            lambda arrays: arrays.update(
                {"model.layers.1.mlp.gate.weight": np.zeros((4, 4), np.float32)}
            ),
            r"F32 \[4, 4\], F32 \[3, 4\] expected",
        ),
    ],
)
def test_wrong_sets_of_tensors_are_found(pruned, source, change, match):
    rewrite(pruned, change)
    refuse(pruned, source, match)


def test_a_shard_that_the_index_does_not_name_is_found(pruned, source):
    save_file({"lm_head.weight": np.zeros(1)}, pruned / "model-00099-of-00099.safetensors")
    refuse(pruned, source, r"model-00099-of-00099\.safetensors: does not belong")


def test_a_damaged_shard_is_a_verification_error(pruned, source):
    shard = next(iter(pruned.glob("*.safetensors")))
    shard.write_bytes(shard.read_bytes()[:-1])
    refuse(pruned, source, f"damaged: .*{shard.name}")


def test_a_damaged_source_is_a_checkpoint_error(pruned, source):
    shard = source.directory / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=shard.name):
        verify(pruned, source.directory, source.facts())


def test_faults_are_collected_up_to_a_number(pruned, source):
    rewrite(pruned, lambda arrays: arrays.update({f"t{i}": np.zeros(1) for i in range(100)}))
    message = refuse(pruned, source, "faults: the first 20;")
    assert message.count("\n") == verification._MAX_FAULTS == 20


def test_faults_of_every_kind_are_collected_together(pruned, source):
    edit_json(pruned / "config.json", lambda config: config.update(n_routed_experts=6))
    (pruned / "tokenizer.json").unlink()
    rewrite(pruned, lambda arrays: arrays.update(surplus=np.zeros(3)))
    message = refuse(pruned, source, "faults: 4;")
    for part in ("n_routed_experts", "tokenizer.json", "surplus", "total_size"):
        assert part in message


# ---- damaged records


def test_a_source_without_experts_is_refused(pruned, source):
    edit_json(pruned / "reap/kept_experts.json", lambda record: record.update(kept={}))
    with pytest.raises(UnsupportedError, match="no layer with experts"):
        verify(pruned, source.directory, SourceFacts({}, 6, COUNT_PATHS))


def test_scores_are_no_part_of_the_weights(pruned, source):
    save_file({"layers.1.tokens": np.zeros((1, 6), np.int64)}, pruned / "reap/scores.safetensors")
    assert load_file(pruned / "reap/scores.safetensors")
    verify(pruned, source.directory, source.facts())
