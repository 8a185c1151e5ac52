from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap_stream.errors import CalibrationError, UsageError
from reap_stream.scoring.selection import (
    Target,
    check_routing,
    kept_count,
    parse_targets,
    select,
)


@st.composite
def layers(draw, *, unique=False):
    groups = draw(st.integers(1, 6))
    per_group = draw(st.integers(1, 8))
    keep = groups * draw(st.integers(1, per_group))
    # Few distinct values, so that ties are the rule.
    values = st.integers(-3, 3) if not unique else st.integers(-(10**6), 10**6)
    experts = groups * per_group
    scores = draw(st.lists(values, min_size=experts, max_size=experts, unique=unique))
    return np.array(scores, np.float64), keep, groups


def naive_select(scores, keep, groups):
    kept = []
    per_group = len(scores) // groups
    for group in range(groups):
        members = range(group * per_group, (group + 1) * per_group)
        ranked = sorted(members, key=lambda expert: (-scores[expert], expert))
        kept += ranked[: keep // groups]
    return tuple(sorted(kept))


@given(layers())
def test_select_is_the_naive_sort(case):
    scores, keep, groups = case
    assert select(scores, keep, groups) == naive_select(scores, keep, groups)


@given(layers(unique=True), st.randoms(use_true_random=False))
def test_select_follows_a_permutation_within_groups(case, random):
    scores, keep, groups = case
    per_group = len(scores) // groups
    order = []
    for group in range(groups):
        members = list(range(group * per_group, (group + 1) * per_group))
        random.shuffle(members)
        order += members
    permuted = select(scores[order], keep, groups)
    assert sorted(order[expert] for expert in permuted) == list(select(scores, keep, groups))


@given(layers())
def test_more_kept_experts_contain_fewer(case):
    scores, keep, groups = case
    if keep > groups:
        assert set(select(scores, keep - groups, groups)) < set(select(scores, keep, groups))


def test_select_takes_infinities_and_refuses_nan():
    assert select(np.array([0.0, np.inf, -np.inf, 1.0]), 2, 1) == (1, 3)
    with pytest.raises(CalibrationError, match=r"expert 1 is NaN \(2 such\)"):
        select(np.array([0.0, np.nan, 1.0, np.nan]), 2, 1)


@pytest.mark.parametrize(("keep", "groups"), [(0, 1), (9, 1), (-1, 1), (6, 4), (2, 3), (2, 0)])
def test_select_refuses_impossible_counts(keep, groups):
    with pytest.raises(UsageError):
        select(np.zeros(8), keep, groups)


@given(st.integers(1, 400), st.integers(0, 9999), st.integers(1, 16))
def test_kept_count_is_exact(per_group, basis_points, groups):
    experts = per_group * groups
    text = f"0.{basis_points:04d}"
    exact = experts - math.floor(experts * Fraction(basis_points, 10_000))
    want = next(n for n in range(exact, experts + 1) if n % groups == 0)
    assert kept_count(experts, text, groups) == want
    assert kept_count(experts, float(text), groups) == want
    assert kept_count(experts, Fraction(text), groups) == want


def test_kept_count_does_not_follow_binary_fractions():
    # int(100 * 0.29) is 28 in binary arithmetic.
    assert int(100 * 0.29) == 28
    assert kept_count(100, 0.29, 1) == kept_count(100, "0.29", 1) == 71


@pytest.mark.parametrize(
    ("sparsity", "keep", "groups", "want"),
    [
        ("0.4", None, 1, [Target(0.4, 96)]),
        ("0.25, 0.3,0.4", None, 1, [Target(0.25, 120), Target(0.3, 112), Target(0.4, 96)]),
        ("0", None, 1, [Target(0.0, 160)]),
        (".5", None, 8, [Target(0.5, 80)]),
        ("1/3", None, 8, [Target(1 / 3, 112)]),
        (None, "96", 1, [Target(0.4, 96)]),
        (None, "160,1", 1, [Target(0.0, 160), Target(159 / 160, 1)]),
        (None, "8", 8, [Target(0.95, 8)]),
    ],
)
def test_parse_targets(sparsity, keep, groups, want):
    assert parse_targets(sparsity, keep, 160, groups) == want


@pytest.mark.parametrize(
    ("sparsity", "keep", "groups", "match"),
    [
        (None, None, 1, "either --sparsity or --keep"),
        ("0.4", "96", 1, "either --sparsity or --keep"),
        ("1", None, 1, "out of range"),
        ("1.5", None, 1, "out of range"),
        ("-0.1", None, 1, "no number"),
        ("40%", None, 1, "no number"),
        ("", None, 1, "no number"),
        ("0.4,,0.5", None, 1, "no number"),
        ("nan", None, 1, "no number"),
        ("1e-999999999", None, 1, "no number"),
        ("1/0", None, 1, "no number"),
        ("0.4,0.40", None, 1, "two targets keep 96"),
        ("0.001,0.002", None, 1, "two targets keep 160"),
        (None, "0", 1, "cannot keep 0 of 160"),
        (None, "161", 1, "give 1 to 160"),
        (None, "96.0", 1, "no whole number"),
        (None, "-8", 1, "no whole number"),
        (None, "96,96", 1, "two targets keep 96"),
        (None, "97", 8, "keep 96 or 104"),
        (None, "3", 8, "keep 8$"),
        (None, "96", 7, "do not divide into 7"),
    ],
)
def test_parse_targets_refuses(sparsity, keep, groups, match):
    with pytest.raises(UsageError, match=match):
        parse_targets(sparsity, keep, 160, groups)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 1.0])
def test_kept_count_refuses_floats_out_of_range(value):
    with pytest.raises(UsageError):
        kept_count(8, value, 1)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6), st.integers(1, 8))
def test_check_routing_allows_exactly_what_a_router_can_do(top_k, groups, topk_groups, per_group):
    topk_groups = min(topk_groups, groups)
    in_reach = per_group * (topk_groups if groups > 1 else 1)
    possible = in_reach >= top_k and (groups == 1 or per_group >= 2)
    if possible:
        check_routing(per_group * groups, top_k, groups, topk_groups)
        return
    with pytest.raises(UsageError, match="keep at least") as refusal:
        check_routing(per_group * groups, top_k, groups, topk_groups)
    advice = int(str(refusal.value).rsplit(" ", 1)[1])
    check_routing(advice, top_k, groups, topk_groups)
    with pytest.raises(UsageError):
        check_routing(advice - groups, top_k, groups, topk_groups)


def test_check_routing_refuses_more_groups_than_there_are():
    with pytest.raises(UsageError, match="takes 5 of its 4 groups"):
        check_routing(16, 2, 4, 5)
