"""Agreement: the choices from two halves of the rows, and what they have in common."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reap_stream.scoring.agreement import Agreement, split_half, undivided
from reap_stream.scoring.choosing import (
    open_chooser,
)
from reap_stream.scoring.halves import half_of_row, row_shares
from reap_stream.scoring.saliency import SUMS, LayerStats
from reap_stream.settings import ChoiceSettings
from tests.layer_statistics import SOURCES, make_stats, naive_scores


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
