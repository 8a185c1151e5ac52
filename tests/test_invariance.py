"""What must not matter does not: batches, order, threads, memory, how experts are run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reap_stream.resident import resident_nbytes
from reap_stream.scoring.saliency import STATISTICS, expert_scores
from reap_stream.scoring.selection import select
from tests.builders import make_rows, write_rows
from tests.engine import prepare, prune_to, read_kept, read_scores, stream
from tests.families import BY_ID

FAMILIES = ["glm4_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "qwen3_next"]
KEEP = 4


@pytest.fixture(scope="session")
def plain(tiny, calibration, tmp_path_factory):
    """The pass as it is by default, once for each family."""
    made = {}

    def make(family_id):
        if family_id not in made:
            ready = prepare(tiny(family_id), calibration)
            made[family_id] = stream(ready, tmp_path_factory.mktemp("plain"))
        return made[family_id]

    return make


def kept(streamed, family_id):
    groups = BY_ID[family_id].groups
    return {
        layer: select(expert_scores(stats, "reap", 0, layer), KEEP, groups)
        for layer, stats in streamed.stats.items()
    }


def assert_same(one, other, family_id, rtol=2e-6):
    """The same tokens to the same experts, scores alike, the same experts kept."""
    assert one.stats.keys() == other.stats.keys()
    for layer, stats in one.stats.items():
        theirs = other.stats[layer]
        np.testing.assert_array_equal(stats.tokens, theirs.tokens)
        for method in ("reap", "ean", "gate"):
            mine, expected = (expert_scores(s, method, 0, layer) for s in (stats, theirs))
            np.testing.assert_allclose(mine, expected, rtol=rtol, err_msg=f"{layer} {method}")
        for name in STATISTICS:
            # A cell may hold a single token, so rounding is not averaged out there.
            mine, expected = getattr(stats, name), getattr(theirs, name)
            np.testing.assert_allclose(mine, expected, rtol=50 * rtol, err_msg=f"{layer} {name}")
    assert kept(one, family_id) == kept(other, family_id)


@pytest.mark.parametrize("batch_tokens", [1, 24, 50, 10_000])
@pytest.mark.parametrize("family_id", FAMILIES)
def test_rows_may_run_together_in_any_number(
    batch_tokens, family_id, plain, tiny, calibration, tmp_path
):
    ready = prepare(tiny(family_id), calibration, batch_tokens=batch_tokens)
    streamed = stream(ready, tmp_path)
    assert_same(streamed, plain(family_id), family_id)
    for got, expected in zip(streamed.states, plain(family_id).states, strict=True):
        for mine, theirs in zip(got, expected, strict=True):
            assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family_id", FAMILIES)
def test_rows_may_come_in_any_order(family_id, plain, tiny, tmp_path):
    specs = write_rows(tmp_path / "reversed", [array[::-1] for array in make_rows()])
    streamed = stream(prepare(tiny(family_id), specs), tmp_path)
    assert_same(streamed, plain(family_id), family_id)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family_id", FAMILIES)
def test_threads_change_nothing(threads, family_id, plain, tiny, calibration, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        streamed = stream(prepare(tiny(family_id), calibration), tmp_path)
    finally:
        torch.set_num_threads(before)
    assert_same(streamed, plain(family_id), family_id)


@pytest.mark.parametrize("family_id", FAMILIES)
def test_hidden_states_in_a_file_are_the_same_bits(family_id, plain, tiny, calibration, tmp_path):
    ready = prepare(tiny(family_id), calibration)
    assert not ready.memory.spill
    streamed = stream(ready, tmp_path, spill=True)
    assert_same(streamed, plain(family_id), family_id, rtol=0)
    for got, expected in zip(streamed.states, plain(family_id).states, strict=True):
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("slots", [1, 3, 5, 7])
@pytest.mark.parametrize("family_id", FAMILIES)
def test_few_expert_slots_give_the_same_bits(slots, family_id, plain, tiny, calibration, tmp_path):
    ready = prepare(tiny(family_id), calibration)
    # Fused experts are held whole, so there is nothing to save on slots.
    assert ready.memory.expert_slots == 8
    streamed = stream(ready, tmp_path, expert_slots=slots)
    assert_same(streamed, plain(family_id), family_id, rtol=0)


@pytest.mark.parametrize("slots", [3, 5])
@pytest.mark.parametrize("family_id", ["glm4_moe", "deepseek_v3"])
def test_few_slots_when_a_batch_reaches_few_experts(slots, family_id, tiny, tmp_path):
    # A row of two tokens reaches four experts at the most, so what a slot holds from the last batch is used again.
    ids = np.random.default_rng(3).integers(3, 96, (60, 2))
    specs = write_rows(tmp_path / "tokens", [ids])
    ready = prepare(tiny(family_id), specs, batch_tokens=1)
    every = stream(ready, tmp_path)
    assert_same(stream(ready, tmp_path, expert_slots=slots), every, family_id, rtol=0)


@pytest.mark.parametrize("slots", [3, 8])
@pytest.mark.parametrize("family_id", FAMILIES)
def test_grouped_products_give_the_same_choice(
    slots, family_id, plain, tiny, calibration, tmp_path
):
    ready = prepare(tiny(family_id), calibration)
    assert not ready.memory.grouped
    streamed = stream(ready, tmp_path, grouped=True, expert_slots=slots)
    assert_same(streamed, plain(family_id), family_id)


@pytest.mark.parametrize("family_id", FAMILIES)
def test_padding_never_counts(family_id, plain):
    tokens = sum(array.size for array in make_rows())
    top_k = {"ernie4_5_moe": "moe_k"}.get(family_id, "num_experts_per_tok")
    for stats in plain(family_id).stats.values():
        assert stats.tokens.sum() == tokens * BY_ID[family_id].values[top_k]


@pytest.mark.parametrize("family_id", FAMILIES)
def test_sources_are_kept_apart(family_id, plain, tiny, calibration, rows, reference):
    oracle = reference(tiny(family_id))
    of_source = [[0, 1, 2, 3], [4, 5, 6], [7]]
    for layer, stats in plain(family_id).stats.items():
        assert stats.shape == (len(calibration), 8)
        for source, numbers in enumerate(of_source):
            sums = oracle.sums(layer, numbers)
            np.testing.assert_array_equal(stats.tokens[source], sums.tokens)
            found = stats.gate_norm_sum[source]
            np.testing.assert_allclose(found, sums.gate_norm_sum, rtol=1e-4)


def test_the_same_rows_twice_double_the_counts_and_change_no_choice(
    plain, tiny, calibration, tmp_path
):
    once = plain("glm4_moe")
    again = write_rows(tmp_path / "again", make_rows())
    twice = stream(prepare(tiny("glm4_moe"), [*calibration, *again]), tmp_path)
    for layer, stats in twice.stats.items():
        np.testing.assert_array_equal(stats.tokens[:3], once.stats[layer].tokens)
        np.testing.assert_array_equal(stats.tokens[3:], once.stats[layer].tokens)
        total = stats.gate_norm_sum.sum(axis=0)
        np.testing.assert_allclose(total, 2 * once.stats[layer].gate_norm_sum.sum(axis=0))
    assert kept(twice, "glm4_moe") == kept(once, "glm4_moe")


@pytest.mark.parametrize("method", ["reap", "ean", "frequency", "gate"])
def test_every_method_is_the_naive_one(method, tiny, calibration, reference, tmp_path):
    source = tiny("glm4_moe")
    output = prune_to(tmp_path / "pruned", source, calibration, KEEP, method=method)
    assert read_kept(output) == reference(source).kept(KEEP, method)


def test_a_small_budget_spills_and_streams_but_decides_alike(tiny, calibration, tmp_path):
    source = tiny("glm4_moe")
    ample = prune_to(tmp_path / "ample", source, calibration, KEEP)
    ready = prepare(source, calibration)
    least = ready.memory.peak_host - 6 * 3 * 16 * 32 * 4
    assert least > resident_nbytes() // 2
    tight = prune_to(tmp_path / "tight", source, calibration, KEEP, memory=least + 4 * 2**20)
    assert read_kept(tight) == read_kept(ample)
    mine, theirs = read_scores(tight), read_scores(ample)
    for name, array in theirs.items():
        np.testing.assert_allclose(mine[name], array, rtol=1e-6)
