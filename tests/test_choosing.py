"""The choice of experts: weights of sources, protected experts, agreement of two halves."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reap_stream.errors import UsageError
from reap_stream.options import add_choice
from reap_stream.scoring.agreement import Agreement, split_half, undivided
from reap_stream.scoring.choosing import (
    PROTECT_CHOICES,
    choose_experts,
    new_chooser,
    open_chooser,
)
from reap_stream.scoring.halves import half_of_row, row_shares
from reap_stream.scoring.saliency import METHODS, SUMS, LayerStats, expert_scores
from reap_stream.scoring.selection import select
from reap_stream.scoring.super_experts import super_experts
from reap_stream.scoring.weights import parse_source_weights, source_factors
from reap_stream.settings import ChoiceSettings

SOURCES = ("a.jsonl:4", "builtin")


def make_stats(seed, sources=2, experts=8):
    """Sums that two halves of the rows lead to; expert 0 is never reached."""
    rng = np.random.default_rng(seed)
    stats = LayerStats.zeros(sources, experts)
    for name, dtype in SUMS.items():
        shape = (sources, experts)
        even, odd = (
            (rng.integers(1, 99, shape) if name == "tokens" else 9 * rng.random(shape)).astype(
                dtype
            )
            for _ in range(2)
        )
        getattr(stats, name)[:] = even + odd
        getattr(stats.odd, name)[:] = odd
    stats.norm_max[:], stats.output_max[:] = rng.random((2, sources, experts))
    for array in stats.arrays().values():
        array[:, 0] = 0
    stats.check()
    return stats


def naive_scores(stats, method, weights):
    """The criterion as the paper writes it, source by source, in plain numbers."""
    sums = {"reap": "gate_norm_sum", "ean": "norm_sum", "gate": "gate_sum"}
    out = []
    for expert in range(stats.shape[1]):
        tokens = sum(w * int(n) for w, n in zip(weights, stats.tokens[:, expert], strict=True))
        if method == "frequency":
            out.append(tokens)
            continue
        terms = getattr(stats, sums[method])[:, expert]
        total = sum(w * float(x) for w, x in zip(weights, terms, strict=True))
        out.append(total / tokens if tokens else 0.0)
    return out


weights_of_two = st.lists(st.sampled_from([0.0, 0.25, 1.0, 2.0, 3.7, 1e6]), min_size=2, max_size=2)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
@given(weights=weights_of_two, seed=st.integers(0, 99))
def test_scores_are_the_naive_weighted_formula(method, weights, seed):
    stats = make_stats(seed)
    found = expert_scores(stats, method, 0, 3, np.array(weights))
    np.testing.assert_allclose(found, naive_scores(stats, method, weights), rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_one_change_no_bit(method):
    stats = make_stats(0)
    plain = expert_scores(stats, method, 1, 3)
    assert plain.tobytes() == expert_scores(stats, method, 1, 3, np.ones(2)).tobytes()


def test_a_source_of_weight_0_is_as_if_it_had_not_been_read():
    stats = make_stats(4)
    alone = LayerStats.of_arrays({name: array[:1] for name, array in stats.arrays().items()})
    layers, choice = {2: stats}, ChoiceSettings(source_weights=(("builtin", 0.0),))
    place = {"groups": 1, "num_layers": 3}
    assert choose_experts(layers, SOURCES, 3, choice, **place) == choose_experts(
        {2: alone}, SOURCES[:1], 3, ChoiceSettings(), **place
    )


labels_of_specs = st.lists(
    st.text(st.sampled_from("ab=,:1."), min_size=1, max_size=6), min_size=1, max_size=4, unique=True
)


def readings(text, names):
    """Every way to read a list: all its cuts at a comma, each piece a name and a number."""
    if not text:
        return [()]
    found = []
    for end in [i for i, char in enumerate(text) if char == ","] + [len(text)]:
        name, _, number = text[:end].rpartition("=")
        if name in names and re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", number):
            found += [
                ((names[name], float(number)), *rest) for rest in readings(text[end + 1 :], names)
            ]
    return found


@given(labels_of_specs, st.data())
def test_a_list_is_read_in_a_way_in_which_it_can_be(labels, data):
    named = data.draw(st.lists(st.sampled_from(labels), min_size=1, unique=True))
    numbers = [data.draw(st.sampled_from(["1", "2", "0.5", "17", ".25"])) for _ in named]
    text = ",".join(f"{label}={number}" for label, number in zip(named, numbers, strict=True))
    names = {label: label for label in labels}
    for label in labels:
        short = re.sub(r":[0-9]+$", "", label)
        if (
            short
            and sum(re.sub(r":[0-9]+$", "", other) == short for other in labels if ":" in other)
            == 1
        ):
            names.setdefault(short, label)
    ways = readings(text, names)
    written = tuple(zip(named, map(float, numbers), strict=True))
    assert written in ways
    try:
        assert parse_source_weights(text, labels) in ways
    except UsageError:
        # Of a text that can be read in several ways, one may name a source twice.
        assert len(set(ways)) > 1


@given(st.lists(st.sampled_from("pqrs"), min_size=1, unique=True), st.permutations("pqrs"))
def test_labels_without_their_counts(named, labels):
    full = [f"dir/{label}=1,x.jsonl:{number}" for number, label in enumerate(labels)]
    text = ",".join(f"dir/{label}=1,x.jsonl=3" for label in named)
    found = dict(parse_source_weights(text, full))
    assert {label[4] for label in found} == set(named)
    assert set(found.values()) == {3.0}
    factors = source_factors(tuple(found.items()), full)
    assert factors.tolist() == [3.0 if label in named else 1.0 for label in labels]


def test_a_count_may_be_left_out_only_where_one_source_is_so_called():
    twice = ("a.jsonl:4", "a.jsonl:8")
    assert source_factors((("a.jsonl:4", 2.0),), twice).tolist() == [2.0, 1.0]
    with pytest.raises(
        UsageError, match=r"no calibration source 'a\.jsonl': there are 'a\.jsonl:4"
    ):
        source_factors((("a.jsonl", 2.0),), twice)
    # A label in full wins over another without its count.
    both = ("a.jsonl", "a.jsonl:8")
    assert source_factors((("a.jsonl", 2.0),), both).tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("c.jsonl=2", r"no calibration source 'c\.jsonl': there are 'a\.jsonl:4', 'builtin'"),
        ("a.jsonl=2,builtin", "'builtin' is no SOURCE=WEIGHT"),
        ("builtin", "no SOURCE=WEIGHT"),
        ("builtin=-1", "no SOURCE=WEIGHT"),
        ("builtin=nan", "no SOURCE=WEIGHT"),
        ("builtin=inf", "no SOURCE=WEIGHT"),
        ("builtin=1e3", "no SOURCE=WEIGHT"),
        ("builtin=1,,a.jsonl=1", "no calibration source ',a.jsonl'"),
        ("=2", "no SOURCE=WEIGHT"),
        ("builtin=1,builtin=2", "'builtin' has two weights"),
        ("a.jsonl=1,a.jsonl:4=2", "'a.jsonl:4' has two weights"),
        ("a.jsonl=0,builtin=0.0", "all calibration sources have the weight 0"),
    ],
)
def test_malformed_weights_are_refused(text, match):
    with pytest.raises(UsageError, match=match):
        parse_source_weights(text, SOURCES)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_impossible_weights_are_refused(weight):
    with pytest.raises(UsageError, match="the weight of calibration source 'builtin' is"):
        source_factors((("builtin", weight),), SOURCES)


def test_no_list_is_no_weights():
    assert parse_source_weights(None, SOURCES) == ()
    assert parse_source_weights("", SOURCES) == ()


def layers_of(maxima):
    """Layers whose statistics are all ones but for the largest elements: layer → [experts]."""
    layers = {}
    for layer, values in maxima.items():
        stats = LayerStats.zeros(1, len(values))
        stats.tokens[:] = 1
        stats.gate_norm_sum[:] = np.arange(len(values))[::-1]
        stats.output_max[:] = values
        layers[layer] = stats
    return layers


def naive_super(maxima, num_layers):
    every = sorted(value for layer in maxima if layer < num_layers for value in maxima[layer])
    # numpy's percentile: linear between the two neighbours.
    place = 0.995 * (len(every) - 1)
    low, high = every[math.floor(place)], every[math.ceil(place)]
    percentile = low + (high - low) * (place - math.floor(place))
    found = {}
    for layer, values in maxima.items():
        experts = tuple(
            number
            for number, value in enumerate(values)
            if value > percentile and value > max(every) / 10 and layer < 0.75 * num_layers
        )
        if experts and layer < num_layers:
            found[layer] = experts
    return found


@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(1, 3), st.sampled_from([1.0, 30.0]))
def test_super_experts_are_as_the_paper_says(seed, dense, mtp, spread):
    rng = np.random.default_rng(seed)
    num_layers = dense + 4
    maxima = {
        layer: np.exp(rng.standard_normal(60) * spread / 10).tolist()
        for layer in range(dense, num_layers + mtp)
    }
    found = super_experts(layers_of(maxima), np.ones(1), num_layers)
    assert found == naive_super(maxima, num_layers)


def test_each_bound_of_super_experts():
    # 4 layers behind a dense one, 200 experts each; num_layers 5: layers 1 to 3 may have some.
    maxima = {layer: [1.0] * 200 for layer in range(1, 5)}
    maxima[1][7], maxima[3][99], maxima[4][3] = 100.0, 50.0, 200.0
    assert super_experts(layers_of(maxima), np.ones(1), 5) == {1: (7,), 3: (99,)}
    # Under a tenth of the largest, wherever that is.
    maxima[4][3] = 501.0
    assert super_experts(layers_of(maxima), np.ones(1), 5) == {1: (7,)}
    # Beyond the decoder: no bound is drawn from there.
    maxima[4][3], maxima[5] = 1.0, [1e9] * 200
    assert super_experts(layers_of(maxima), np.ones(1), 5) == {1: (7,), 3: (99,)}
    # Of three hundred equals none is above the percentile.
    assert super_experts(layers_of({1: [3.0] * 300}), np.ones(1), 5) == {}
    assert super_experts(layers_of({1: [0.0] * 300}), np.ones(1), 5) == {}
    assert super_experts({}, np.ones(1), 5) == {}


def test_a_source_left_out_makes_no_expert_super():
    stats = LayerStats.zeros(2, 8)
    stats.tokens[:] = 1
    stats.output_max[0, 3], stats.output_max[1, 5] = 10.0, 1.0
    assert super_experts({0: stats}, np.array([1.0, 1.0]), 4) == {0: (3,)}
    assert super_experts({0: stats}, np.array([0.0, 1.0]), 4) == {0: (5,)}


def test_protected_experts_go_last():
    layers = layers_of({1: [1.0] * 7 + [99.0], 2: [1.0] * 8})
    choice = ChoiceSettings(protect="super")
    place = {"groups": 1, "num_layers": 4}
    assert choose_experts(layers, ("a",), 3, ChoiceSettings(), **place) == {
        1: (0, 1, 2),
        2: (0, 1, 2),
    }
    assert choose_experts(layers, ("a",), 3, choice, **place) == {1: (0, 1, 7), 2: (0, 1, 2)}
    # Random choice protects as well, and each group keeps its number.
    grouped = {"groups": 4, "num_layers": 4}
    kept = choose_experts(layers, ("a",), 4, replace(choice, method="random"), **grouped)
    assert kept[1][-1] == 7
    assert [expert // 2 for expert in kept[1]] == [0, 1, 2, 3]


def test_more_protected_experts_than_places():
    maxima = {1: [1.0] * 400}
    maxima[1][:2] = [90.0, 91.0]
    layers, choice = layers_of(maxima), ChoiceSettings(protect="super")
    chooser = open_chooser(layers, ("a",), choice, groups=100, num_layers=4)
    chooser.check(400, 200)
    match = (
        r"layer 1: 2 protected experts in router group 0 of 100, and keeping 100 leaves 1 places"
        r".*at least 200"
    )
    with pytest.raises(UsageError, match=match):
        chooser.check(400, 100)
    with pytest.raises(UsageError, match=match):
        chooser.choose(1, layers[1], 100)


def test_protection_needs_the_largest_elements():
    layers = {3: make_stats(0)}
    layers[3].output_max = None
    with pytest.raises(UsageError, match=r"layer 3 have no output_max.*observe again"):
        open_chooser(layers, SOURCES, ChoiceSettings(protect="super"), groups=1, num_layers=4)
    open_chooser(layers, SOURCES, ChoiceSettings(), groups=1, num_layers=4)
    with pytest.raises(UsageError, match="cannot protect 'all': there are none, super"):
        new_chooser(SOURCES, ChoiceSettings(protect="all"), groups=1, num_layers=4)


def test_the_command_line_offers_every_protection():
    parser = argparse.ArgumentParser()
    add_choice(parser)
    (action,) = [a for a in parser._actions if a.dest == "protect"]
    assert tuple(action.choices) == PROTECT_CHOICES


@given(st.integers(0, 99), st.sets(st.integers(0, 7), max_size=2), st.sampled_from([1, 2]))
def test_select_with_protected_experts(seed, protected, groups):
    scores = np.random.default_rng(seed).integers(0, 4, 8).astype(np.float64)
    raised = scores.copy()
    raised[list(protected)] += 100
    assert select(scores, 4, groups, sorted(protected)) == select(raised, 4, groups)


def test_rows_are_dealt_to_halves_of_each_source():
    assert [half_of_row(n) for n in range(8)] == [0, 1, 1, 0, 1, 0, 0, 1]
    assert row_shares([0, 1, 0, 1, 1, 0]).tolist() == [0, 2, 1, 3, 3, 1]


@given(st.integers(0, 5), st.integers(1, 400))
def test_rows_that_alternate_between_kinds_are_dealt_evenly(log_kinds, turns):
    kinds = 2**log_kinds
    for kind in range(kinds):
        halves = [half_of_row(turn * kinds + kind) for turn in range(turns)]
        assert abs(2 * sum(halves) - turns) <= 1


@given(st.integers(0, 10**6), st.integers(2, 7), st.sampled_from(["reap", "frequency", "gate"]))
def test_agreement_is_that_of_two_choices(seed, keep, method):
    layers = {1: make_stats(seed), 4: make_stats(seed + 1)}
    choice = ChoiceSettings(method=method, source_weights=(("builtin", 2.0),))
    chooser = open_chooser(layers, SOURCES, choice, groups=1, num_layers=5)
    shares = []
    for stats in layers.values():
        kept = []
        for half in (1, 0):
            parts = LayerStats.zeros(2, 8)
            for name in SUMS:
                odd = getattr(stats.odd, name)
                getattr(parts, name)[:] = odd if half else getattr(stats, name) - odd
            scores = naive_scores(parts, method, [1.0, 2.0])
            kept.append(sorted(range(8), key=lambda e: (-scores[e], e))[:keep])
        shares.append(len({*kept[0]} & {*kept[1]}) / keep)
    found = split_half(chooser, layers, keep)
    assert found.mean == pytest.approx(sum(shares) / 2)
    assert (found.lowest, found.layer) == (min(shares), (1, 4)[shares.index(min(shares))])
    assert found.chance == keep / 8


@given(st.floats(0, 1), st.integers(1, 7))
def test_agreement_is_low_under_half_of_what_chance_leaves(mean, keep):
    chance = keep / 8
    assume(abs(mean - (1 + chance) / 2) > 1e-9)
    assert Agreement(mean, 0.0, 0, chance).low == ((mean - chance) / (1 - chance) < 0.5)
    assert not Agreement(1.0, 1.0, 0, 1.0).low


def test_what_two_halves_cannot_be_taken_of():
    def why(layers, **choice):
        settings = ChoiceSettings(**choice)
        chooser = open_chooser(layers, SOURCES, settings, groups=1, num_layers=5)
        return undivided(chooser, layers, SOURCES)

    layers = {1: make_stats(0), 2: make_stats(1)}
    assert why(layers) is None
    assert why(layers, method="random") == "the choice is random"
    single = {layer: make_stats(layer) for layer in (1, 2)}
    for stats in single.values():
        for name in SUMS:
            getattr(stats.odd, name)[1] = 0
    assert why(single) == "calibration source 'builtin' has a single row"
    assert why(single, source_weights=(("builtin", 0.0),)) is None
    layers[2].odd = None
    assert "version" in why(layers)
