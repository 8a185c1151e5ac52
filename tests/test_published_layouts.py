"""Checkpoints spelt as they are really published, against the model that they hold."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from reap_stream.verifying import verify_directory
from tests.builders import (
    load_tensors,
    read_config,
    save,
    tiny_config,
    tiny_model,
    write_checkpoint,
)
from tests.engine import prune_to, read_kept
from tests.families import BY_ID, NUM_EXPERTS
from tests.layout_spelling import written_by_transformers_4
from tests.layouts import LAYOUTS
from tests.oracle import run
from tests.oracle_pruning import assert_kept_bytes, prune_by_hand

KEEP = 4
EVERY = pytest.mark.parametrize("name", [n for n, to in LAYOUTS.items() if to.family in BY_ID])
# Families whose experts transformers can write alone or fused.
BOTH_WAYS = ["mixtral", "qwen3_moe", "deepseek_v3", "ernie4_5_moe", "nemotron_h", "lfm2_moe"]


def merged(config, changes):
    """`config` with other values; None takes a key away."""
    return {key: v for key, v in {**config, **changes}.items() if v is not None}


@pytest.fixture(scope="session")
def published(tiny, tmp_path_factory):
    """The family's tiny model in a published layout, with a config of transformers 4."""
    made = {}

    def make(name):
        if name not in made:
            layout = LAYOUTS[name]
            config = written_by_transformers_4(read_config(tiny(layout.family)))
            tensors = layout.tensors(tiny_model(BY_ID[layout.family]).state_dict())
            directory = tmp_path_factory.mktemp("published") / name
            made[name] = write_checkpoint(directory, tensors, merged(config, layout.config))
        return made[name]

    return make


@pytest.fixture(scope="session")
def pruned(published, calibration, tmp_path_factory):
    """The published checkpoint pruned to KEEP experts."""
    made = {}

    def make(name):
        if name not in made:
            output = tmp_path_factory.mktemp("pruned") / name
            made[name] = prune_to(output, published(name), calibration, KEEP)
        return made[name]

    return make


def assert_is_the_model_pruned_by_hand(output, family_id, model, rows):
    loaded, info = AutoModelForCausalLM.from_pretrained(
        output, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not {name: found for name, found in info.items() if found}
    family = BY_ID[family_id]
    config = tiny_config(family, **{family.count_key: KEEP})
    config._experts_implementation = "eager"
    smaller = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    by_hand = prune_by_hand(model, smaller, read_kept(output))
    for row in rows:
        torch.testing.assert_close(run(loaded.eval(), row), run(by_hand, row), rtol=1e-6, atol=1e-6)


@EVERY
def test_the_layout_is_the_published_one(name, published):
    assert set(LAYOUTS[name].names) <= set(load_tensors(published(name)))


@EVERY
def test_a_published_layout_prunes_to_the_reference(name, published, pruned, tiny, rows, reference):
    output, family_id = pruned(name), LAYOUTS[name].family
    oracle = reference(tiny(family_id))
    assert read_kept(output) == oracle.kept(KEEP, groups=BY_ID[family_id].groups)
    assert_is_the_model_pruned_by_hand(output, family_id, oracle.model, rows)


@EVERY
def test_a_published_layout_keeps_names_and_bytes(name, published, pruned):
    source, output = published(name), pruned(name)
    assert_kept_bytes(source, output, read_kept(output))
    assert verify_directory(output, source).keep == KEEP


@EVERY
def test_the_config_keeps_its_publishers_keys(name, published, pruned):
    before, after = read_config(published(name)), read_config(pruned(name))
    assert list(before) == list(after)
    changed = {key for key in before if before[key] != after[key]}
    assert len(changed) == 1
    assert {before[key] for key in changed} == {NUM_EXPERTS}
    assert {after[key] for key in changed} == {KEEP}


@pytest.mark.parametrize("family_id", BOTH_WAYS)
def test_experts_in_one_tensor_prune_as_those_stored_alone(
    family_id, tiny, calibration, rows, reference, tmp_path
):
    source = save(tiny_model(BY_ID[family_id]), tmp_path / "fused", save_original_format=False)
    fused = {name: tensor for name, tensor in load_tensors(source).items() if "_proj" in name}
    assert any(name.endswith("experts.down_proj") for name in fused)
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP)
    oracle = reference(tiny(family_id))
    assert read_kept(output) == oracle.kept(KEEP, groups=BY_ID[family_id].groups)
    assert_kept_bytes(source, output, read_kept(output))
    assert_is_the_model_pruned_by_hand(output, family_id, oracle.model, rows)


@pytest.mark.parametrize(
    ("family_id", "values", "keys"),
    [
        # transformers 5 renames the key; a tool that edits config.json may leave both.
        ("qwen3_moe", {"num_experts": 8}, {"num_experts", "num_local_experts"}),
        ("hunyuan_v1_moe", {"moe_topk": [2] * 3}, {"num_experts"}),
        # Of the same value as the number of experts by chance.
        ("ernie4_5_moe", {"moe_capacity": [8, 8], "moe_layer_interval": 1}, {"moe_num_experts"}),
        ("glm4_moe", {"num_nextn_predict_layers": 0, "ep_size": 8}, {"n_routed_experts"}),
    ],
)
def test_every_spelling_of_the_count_is_changed_and_nothing_else(
    family_id, values, keys, tiny, calibration, tmp_path
):
    source = tiny(family_id)
    config = {**read_config(source), **values}
    copy = write_checkpoint(tmp_path / "source", load_tensors(source), config)
    output = prune_to(tmp_path / "pruned", copy, calibration, KEEP)
    after = read_config(output)
    assert {key for key in config if config[key] != after[key]} == keys
    for key in keys:
        assert after[key] == KEEP
    _, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not {name: found for name, found in info.items() if found}


def test_identity_experts_need_no_tensors(tiny, calibration, rows, reference, tmp_path):
    # transformers writes gate and up projections for them, the publisher does not.
    def without(tensors, count):
        found = {name: re.search(r"\.experts\.(\d+)\.", name) for name in tensors}
        return {n: tensors[n] for n, m in found.items() if m is None or int(m[1]) < count}

    source, keep = tiny("longcat_flash"), KEEP
    written = prune_to(tmp_path / "written", source, calibration, keep)
    tensors = without(load_tensors(source), NUM_EXPERTS)
    assert len(tensors) < len(load_tensors(source))
    published = write_checkpoint(tmp_path / "source", tensors, read_config(source))
    output = prune_to(tmp_path / "pruned", published, calibration, keep)
    assert read_kept(output) == reference(source).kept(keep) == read_kept(written)
    found, expected = load_tensors(output), without(load_tensors(written), keep)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert verify_directory(output, published).keep == keep
