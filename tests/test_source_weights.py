"""Weights of sources: how a list of them is read, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap_stream.errors import UsageError
from reap_stream.scoring.weights import parse_source_weights, source_factors
from tests.layer_statistics import SOURCES

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
