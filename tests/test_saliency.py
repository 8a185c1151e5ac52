from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap_stream.errors import CalibrationError, UsageError
from reap_stream.scoring.merging import merge_scores
from reap_stream.scoring.saliency import (
    METHODS,
    OPTIONAL_STATISTICS,
    STATISTICS,
    SUMS,
    LayerStats,
    expert_scores,
    unreached,
)
from tests.whole_scores import EXPERTS, by_label, make_scores, make_stats


def without(stats, *names):
    """The statistics as earlier versions took them."""
    return LayerStats.of_arrays({k: v for k, v in stats.arrays().items() if k not in names})


def naive_scores(stats, method):
    out = []
    for expert in range(stats.shape[1]):
        column = {name: getattr(stats, name)[:, expert] for name in STATISTICS}
        tokens = sum(column["tokens"].tolist())
        total = {
            "reap": sum(column["gate_norm_sum"].tolist()),
            "ean": sum(column["norm_sum"].tolist()),
            "gate": sum(column["gate_sum"].tolist()),
        }
        if method == "frequency":
            out.append(tokens)
        else:
            out.append(total[method] / tokens if tokens else 0.0)
    return out


@pytest.mark.parametrize("method", [method for method in METHODS if method != "random"])
def test_expert_scores_are_the_formula(method):
    stats = make_stats(np.random.default_rng(3), 3)
    scores = expert_scores(stats, method, seed=0, layer=1)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, naive_scores(stats, method), rtol=1e-15)
    assert scores[0] == 0


def test_expert_scores_leave_the_sums_alone():
    stats = make_stats(np.random.default_rng(3), 1)
    copy = {name: getattr(stats, name).copy() for name in STATISTICS}
    for method in METHODS:
        expert_scores(stats, method, seed=0, layer=1)
    for name, array in copy.items():
        np.testing.assert_array_equal(getattr(stats, name), array)


def test_random_scores_depend_on_seed_and_layer_alone():
    first, second = (make_stats(np.random.default_rng(n), 1) for n in (1, 2))
    one = expert_scores(first, "random", seed=7, layer=3)
    expert_scores(first, "random", seed=7, layer=4)
    np.testing.assert_array_equal(one, expert_scores(second, "random", seed=7, layer=3))
    assert not np.array_equal(one, expert_scores(first, "random", seed=7, layer=4))
    assert not np.array_equal(one, expert_scores(first, "random", seed=8, layer=3))


def test_unknown_method():
    with pytest.raises(UsageError, match=r"'reaper'.*reap, ean"):
        expert_scores(LayerStats.zeros(1, 2), "reaper", seed=0, layer=0)


def test_unreached_counts_all_sources():
    stats = LayerStats.zeros(2, 4)
    stats.tokens[0, 1] = 1
    stats.tokens[1, 3] = 1
    assert unreached(stats) == [0, 2]


def test_add_takes_the_larger_maximum():
    rng = np.random.default_rng(0)
    left, right = make_stats(rng, 2), make_stats(rng, 2)
    want = {
        name: [array.tolist(), right.arrays()[name].tolist()]
        for name, array in left.arrays().items()
    }
    assert want.keys() == {*STATISTICS, *OPTIONAL_STATISTICS}
    left.add(right)
    for name, pair in want.items():
        combine = max if name.endswith("_max") else lambda a, b: a + b
        expected = [
            [combine(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(*pair, strict=True)
        ]
        assert left.arrays()[name].tolist() == expected
    with pytest.raises(CalibrationError, match=r"\[1, 5\] cannot be added to \[2, 5\]"):
        left.add(make_stats(rng, 1))


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, unique=True), min_size=3, max_size=3))
def test_merge_is_associative_and_commutative(labels):
    a, b, c = (
        make_scores(seed, sources=tuple(own), numbers=(0, 4)) for seed, own in enumerate(labels)
    )
    whole = merge_scores([a, b, c])
    assert whole.sources == tuple(dict.fromkeys(labels[0] + labels[1] + labels[2]))
    assert by_label(merge_scores([merge_scores([a, b]), c])) == by_label(whole)
    assert by_label(merge_scores([a, merge_scores([b, c])])) == by_label(whole)
    assert by_label(merge_scores([c, b, a])) == by_label(whole)
    # Against the definition: each label's rows of all runs, summed.
    for (layer, label, name), row in by_label(whole).items():
        rows = [by_label(run)[layer, label, name] for run in (a, b, c) if label in run.sources]
        combine = max if name.endswith("_max") else sum
        assert row == [combine(column) for column in zip(*rows, strict=True)]


@given(st.permutations([(), ("output_max",), tuple(n for n in OPTIONAL_STATISTICS)]))
def test_merge_keeps_later_statistics_where_all_have_them(lacking):
    runs = [make_scores(seed, sources=("a",), numbers=(3,)) for seed in range(3)]
    for run, names in zip(runs, lacking, strict=True):
        run.layers[3] = without(run.layers[3], *names)
    pair, every = merge_scores(runs[:2]).layers[3], merge_scores(runs).layers[3]
    gone = {name for names in lacking[:2] for name in names}
    assert pair.arrays().keys() == {*STATISTICS, *OPTIONAL_STATISTICS} - gone
    assert every.arrays().keys() == {*STATISTICS}
    assert (pair.odd is None, pair.output_max is None) == ("odd.tokens" in gone, bool(gone))
    assert pair.tokens.tolist() == sum(run.layers[3].tokens for run in runs[:2]).tolist()


def test_the_halves_add_up():
    stats = make_stats(np.random.default_rng(3), 2)
    even, odd = stats.halves()
    for name in SUMS:
        np.testing.assert_array_equal(
            getattr(even, name) + getattr(odd, name), getattr(stats, name)
        )
    assert without(stats, *OPTIONAL_STATISTICS).halves() is None


def test_merge_keeps_what_metadata_agree_on_and_inputs_whole():
    a, b = make_scores(0), make_scores(1)
    before = by_label(a)
    merged = merge_scores([a, b])
    assert merged.metadata == {"corpus": "00ff"}
    assert by_label(a) == before


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"model_fingerprint": "xyz"}, "model is xyz, not abc"),
        ({"layers": {1: LayerStats.zeros(2, EXPERTS)}}, r"MoE layers is \[1\], not \[1, 2, 10\]"),
        (
            {"layers": {n: LayerStats.zeros(2, 6) for n in (1, 2, 10)}, "num_experts": 6},
            "number of experts is 6, not 5",
        ),
        ({"sources": ("a", "a")}, "no source twice"),
        ({"metadata": {"propagate": "pruned"}}, "propagation is pruned, not None"),
    ],
)
def test_merge_refuses_what_does_not_belong_together(other, match):
    with pytest.raises(CalibrationError, match=match):
        merge_scores([make_scores(0), make_scores(1, **other)])
    with pytest.raises(CalibrationError, match="no scores"):
        merge_scores([])


def test_merge_refuses_the_same_rows_twice():
    runs = [make_scores(n, metadata={"calibration_sha256": text}) for n, text in enumerate("aba")]
    assert merge_scores(runs[:2]).metadata == {}
    with pytest.raises(CalibrationError, match=r"scores 3 were taken on the same .* as scores 1"):
        merge_scores(runs)


def test_scoring_needs_no_torch():
    code = (
        "import sys, reap_stream.scoring.scores_file, reap_stream.scoring.selection;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
