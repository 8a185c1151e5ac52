"""The jobs against each other and against the model pruned by hand, layer after layer."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from reap_stream.compaction import compact
from reap_stream.pipeline import observe
from reap_stream.scoring.scores_file import load_scores
from reap_stream.settings import ChoiceSettings, OutputSettings
from reap_stream.verifying import verify_directory
from tests.builders import load_tensors, read_config, tiny_config
from tests.engine import prune_to, read_kept, read_scores, run_settings
from tests.families import BY_ID, NUM_EXPERTS
from tests.oracle import ExpertsCall, decoder_layers, experts_modules, naive_sums, run
from tests.oracle_pruning import best, prune_by_hand

KEEP = 4


def shards(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def smaller_model(family_id):
    config = tiny_config(BY_ID[family_id], **{BY_ID[family_id].count_key: KEEP})
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class Caught(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward once a layer's input is known."""


def layer_input(model, layer, row):
    """What the model calls a layer with."""
    found = []

    def catch(module, args, kwargs):
        found.append((args, kwargs))
        raise Caught

    handle = decoder_layers(model)[layer].register_forward_pre_hook(catch, with_kwargs=True)
    with pytest.raises(Caught):
        run(model, row)
    handle.remove()
    return found[0]


def experts_call(model, layer, args, kwargs):
    """The call of a layer's experts when the layer is run on its own."""
    found = []

    def catch(module, args, kwargs):
        found.append(ExpertsCall(*args, *kwargs.values()))

    handle = experts_modules(model)[layer].register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        decoder_layers(model)[layer](*args, **kwargs)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("family_id", ["glm4_moe", "mixtral", "gpt_oss", "qwen3_next"])
def test_later_layers_see_pruned_ones(family_id, tiny, calibration, rows, reference, tmp_path):
    source = tiny(family_id)
    model = reference(source).model
    kept = {}
    for layer, module in sorted(experts_modules(model).items()):
        chosen = {number: kept.get(number, range(KEEP)) for number in experts_modules(model)}
        pruned = prune_by_hand(model, smaller_model(family_id), chosen)
        calls = [experts_call(model, layer, *layer_input(pruned, layer, row)) for row in rows]
        exact = copy.deepcopy(module).double()
        scores = naive_sums(exact, calls).scores("reap")
        kept[layer] = best(scores, KEEP, 1)
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP, propagate="pruned")
    assert read_kept(output) == kept
    last = max(kept)
    found = read_scores(output)
    tokens = found[f"layers.{last}.tokens"].sum(axis=0)
    sums = found[f"layers.{last}.gate_norm_sum"].sum(axis=0)
    np.testing.assert_allclose(sums / np.maximum(tokens, 1), scores, rtol=1e-5)
    # The first MoE layer sees the same either way; some later one must not.
    original = reference(source).sums(last).scores("reap")
    assert not np.allclose(original, scores, rtol=1e-3)


def test_observe_and_compact_are_prune(tiny, calibration, tmp_path):
    source = tiny("glm4_moe")
    pruned = prune_to(tmp_path / "pruned", source, calibration, KEEP)
    scores = tmp_path / "scores.safetensors"
    observe(run_settings(source, calibration), scores)
    output = OutputSettings(output=tmp_path / "compacted", keep=str(KEEP))
    compact(source, scores, ChoiceSettings(), output)
    assert shards(tmp_path / "compacted") == shards(pruned)
    assert read_kept(tmp_path / "compacted") == read_kept(pruned)
    config = "config.json"
    assert (tmp_path / "compacted" / config).read_bytes() == (pruned / config).read_bytes()
    verify_directory(tmp_path / "compacted", source)
    mine, theirs = load_scores(scores), load_scores(pruned / "reap" / "scores.safetensors")
    for layer, stats in theirs.layers.items():
        np.testing.assert_array_equal(mine.layers[layer].gate_norm_sum, stats.gate_norm_sum)


@pytest.mark.parametrize("method", ["ean", "frequency", "gate", "random"])
def test_one_scores_file_serves_every_method(method, tiny, calibration, tmp_path):
    source = tiny("glm4_moe")
    pruned = prune_to(tmp_path / "pruned", source, calibration, KEEP, method=method, seed=5)
    output = OutputSettings(output=tmp_path / "compacted", keep=str(KEEP))
    compact(source, pruned / "reap" / "scores.safetensors", ChoiceSettings(method, 5), output)
    assert shards(tmp_path / "compacted") == shards(pruned)


def test_several_targets_are_as_each_alone(tiny, calibration, tmp_path):
    source = tiny("deepseek_v3")
    both = prune_to(tmp_path / "both", source, calibration, "4,6")
    assert sorted(path.name for path in both.iterdir()) == ["keep-4", "keep-6"]
    for keep in (4, 6):
        alone = prune_to(tmp_path / f"alone-{keep}", source, calibration, keep)
        assert shards(both / f"keep-{keep}") == shards(alone)
        assert read_kept(both / f"keep-{keep}") == read_kept(alone)
        verify_directory(both / f"keep-{keep}", source)
    few, many = read_kept(both / "keep-4"), read_kept(both / "keep-6")
    assert all(set(few[layer]) < set(many[layer]) for layer in few)


@pytest.mark.parametrize("family_id", ["glm4_moe", "gpt_oss", "jamba"])
def test_keeping_all_experts_changes_no_tensor(family_id, tiny, calibration, tmp_path):
    source = tiny(family_id)
    output = prune_to(tmp_path / "pruned", source, calibration, NUM_EXPERTS)
    before, after = load_tensors(source), load_tensors(output)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_config(output) == read_config(source)


def test_a_pruned_checkpoint_can_be_pruned_again(tiny, calibration, tmp_path):
    source = tiny("glm4_moe")
    once = prune_to(tmp_path / "once", source, calibration, 6)
    twice = prune_to(tmp_path / "twice", once, calibration, 4)
    verify_directory(twice, once)
    assert read_config(twice)["n_routed_experts"] == 4
    first, second = read_kept(once), read_kept(twice)
    through = {layer: [first[layer][slot] for slot in second[layer]] for layer in second}
    source_tensors, left = load_tensors(source), load_tensors(twice)
    for layer, experts in through.items():
        router = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(left[router], source_tensors[router][experts])


@pytest.mark.parametrize("family_id", ["glm4_moe", "qwen3_moe", "jamba"])
def test_the_card_counts_parameters_as_transformers_does(
    family_id, tiny, calibration, reference, tmp_path
):
    source = tiny(family_id)
    card = (prune_to(tmp_path / "out", source, calibration, KEEP) / "README.md").read_text()
    before = reference(source).model.num_parameters()
    after = smaller_model(family_id).num_parameters()
    assert f"| parameters | {before / 1e6:.4g} M | {after / 1e6:.4g} M |" in card
    assert f"{NUM_EXPERTS - KEEP} of {NUM_EXPERTS} routed experts removed" in card


def test_the_record_says_what_was_run(tiny, calibration, tmp_path):
    source = tiny("glm4_moe")
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP, seed=3)
    record = json.loads((output / "reap" / "run.json").read_text())
    assert record["settings"]["keep"] == str(KEEP)
    assert record["settings"]["seed"] == 3
    assert record["settings"]["propagate"] == "original"
    # Others will read it: data is named without the directories of this machine.
    names = [Path(spec).name for spec in calibration]
    assert record["calibration"]["sources"] == names
    assert (record["calibration"]["rows"], record["calibration"]["tokens"]) == (8, 156)
    origins = record["calibration"]["origins"]
    assert [origin["source"] for origin in origins] == names
    assert sum(origin["tokens"] for origin in origins) == 156
    assert len({origin["sha256"] for origin in origins}) == len(calibration)
    assert record["source"]["architecture"] == "Glm4MoeForCausalLM"
    written = sum(tensor.nbytes for tensor in load_tensors(output).values())
    assert record["written_nbytes"] == written
    assert record["peak_resident_nbytes"] > 0


def test_experts_without_a_token_are_named_and_go_first(tiny, tmp_path):
    path = tmp_path / "one.npy"
    np.save(path, np.array([[7, 9]]))
    output = prune_to(tmp_path / "pruned", tiny("glm4_moe"), [str(path)], KEEP)
    record = json.loads((output / "reap" / "run.json").read_text())
    kept, scores = read_kept(output), read_scores(output)
    for layer, experts in kept.items():
        idle = np.flatnonzero(scores[f"layers.{layer}.tokens"].sum(axis=0) == 0).tolist()
        assert record["unreached_experts"][str(layer)] == idle
        reached = set(range(NUM_EXPERTS)) - set(idle)
        assert reached <= set(experts)
        assert sorted(set(experts) - reached) == idle[: KEEP - len(reached)]


def test_side_files_go_along(tiny, calibration, tmp_path):
    source = tiny("glm4_moe", max_shard_size="30KB")
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP, max_shard_nbytes=20_000)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name not in (
            "config.json",
            "model.safetensors.index.json",
        ):
            assert (output / path.name).read_bytes() == path.read_bytes()
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards(output))
    assert len(shards(output)) > 3
    total = sum(tensor.nbytes for tensor in load_tensors(output).values())
    assert index["metadata"]["total_size"] == total
