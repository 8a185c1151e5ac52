"""The choice of experts: weighted scores and protected experts."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap_stream.errors import UsageError
from reap_stream.options import add_choice
from reap_stream.scoring.choosing import (
    PROTECT_CHOICES,
    choose_experts,
    new_chooser,
    open_chooser,
)
from reap_stream.scoring.saliency import METHODS, LayerStats, expert_scores
from reap_stream.scoring.selection import select
from reap_stream.scoring.super_experts import super_experts
from reap_stream.settings import ChoiceSettings
from tests.layer_statistics import SOURCES, make_stats, naive_scores

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
