"""Every family against transformers: hidden states, scores, kept experts, the pruned checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reap_stream.verifying import verify_directory
from tests.builders import load_tensors, model_class, read_config, tiny_config
from tests.engine import corpus_rows, prepare, prune_to, read_kept, read_scores, stream
from tests.families import BY_ID, FAMILIES, NUM_EXPERTS
from tests.oracle import load_class, run
from tests.oracle_pruning import assert_kept_bytes, prune_by_hand

KEEP = 4
VARIANTS = [
    pytest.param("glm4_moe", {"max_shard_size": "20KB"}, id="sharded"),
    pytest.param("qwen3_moe", {"tie_word_embeddings": True}, id="tied"),
    pytest.param("mixtral", {"dtype": torch.bfloat16}, id="bfloat16"),
    pytest.param("deepseek_v3", {"dtype": torch.float16}, id="float16"),
    pytest.param("gpt_oss", {"dtype": torch.bfloat16, "max_shard_size": "20KB"}, id="fused"),
    pytest.param("jamba", {"tie_word_embeddings": True}, id="tied-hybrid"),
]
EVERY = [pytest.param(family.id, {}, id=family.id) for family in FAMILIES] + VARIANTS


@pytest.fixture(scope="session")
def pruned(tiny, calibration, tmp_path_factory):
    """The checkpoint of a variant pruned to KEEP experts, once."""
    made = {}

    def make(family_id, options):
        key = repr((family_id, options))
        if key not in made:
            source = tiny(family_id, **options)
            output = tmp_path_factory.mktemp("pruned") / family_id
            made[key] = source, prune_to(output, source, calibration, KEEP)
        return made[key]

    return make


@pytest.mark.parametrize(("family_id", "options"), EVERY)
def test_streamed_hidden_states_are_the_whole_models(
    family_id, options, tiny, calibration, rows, reference, tmp_path
):
    source = tiny(family_id, **options)
    ready = prepare(source, calibration)
    for mine, row in zip(corpus_rows(ready), rows, strict=True):
        np.testing.assert_array_equal(mine, row)
    streamed = stream(ready, tmp_path)
    whole = reference(source).states
    assert len(streamed.states) == len(whole)
    for layer, (got, expected) in enumerate(zip(streamed.states, whole, strict=True)):
        for row, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
            error = (mine - theirs).abs().max() / theirs.abs().max()
            assert error < 1e-5, (layer, row, float(error))


@pytest.mark.parametrize(("family_id", "options"), EVERY)
def test_scores_and_kept_experts_are_the_naive_references(family_id, options, pruned, reference):
    source, output = pruned(family_id, options)
    oracle, scores, kept = reference(source), read_scores(output), read_kept(output)
    assert set(kept) == set(oracle.calls)
    for layer in oracle.calls:
        sums = oracle.sums(layer)
        tokens = scores[f"layers.{layer}.tokens"].sum(axis=0)
        np.testing.assert_array_equal(tokens, sums.tokens)
        for name in ("gate_sum", "norm_sum", "gate_norm_sum"):
            found = scores[f"layers.{layer}.{name}"].sum(axis=0)
            np.testing.assert_allclose(found, getattr(sums, name), rtol=1e-6, err_msg=name)
        largest = scores[f"layers.{layer}.norm_max"].max(axis=0)
        np.testing.assert_allclose(largest, sums.norm_max, rtol=1e-5)
    assert kept == oracle.kept(KEEP, groups=BY_ID[family_id].groups)


@pytest.mark.parametrize(("family_id", "options"), EVERY)
def test_pruned_checkpoint_is_the_model_pruned_by_hand(family_id, options, pruned, rows, reference):
    source, output = pruned(family_id, options)
    loaded, info = load_class(output).from_pretrained(
        output, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not {name: found for name, found in info.items() if found}
    changes = {name: value for name, value in options.items() if name.startswith("tie")}
    config = tiny_config(BY_ID[family_id], **{BY_ID[family_id].count_key: KEEP}, **changes)
    smaller = model_class(BY_ID[family_id]).from_config(
        config, dtype=torch.float32, experts_implementation="eager"
    )
    by_hand = prune_by_hand(reference(source).model, smaller, read_kept(output))
    for row in rows:
        expected = run(by_hand, row)
        assert torch.isfinite(expected).all()
        # Products may round differently where loaded weights lie at other places in memory.
        least = 1e-6 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(run(loaded.eval(), row), expected, rtol=1e-6, atol=least)


@pytest.mark.parametrize(("family_id", "options"), EVERY)
def test_kept_tensors_keep_their_bytes(family_id, options, pruned):
    source, output = pruned(family_id, options)
    assert_kept_bytes(source, output, read_kept(output))


@pytest.mark.parametrize(("family_id", "options"), EVERY)
def test_verify_finds_nothing_and_config_changes_only_in_the_count(family_id, options, pruned):
    source, output = pruned(family_id, options)
    report = verify_directory(output, source)
    assert (report.keep, report.tensors) == (KEEP, len(load_tensors(output)))
    before, after = flat(read_config(source)), flat(read_config(output))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed, "the number of experts must change"
    assert all((before[key], after[key]) == (NUM_EXPERTS, KEEP) for key in changed)
    assert list(before) == list(after)


def flat(config, prefix=""):
    """Values of a config by dotted key."""
    found = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        found.update(flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return found
