"""Patterns in quantisation settings select, after pruning, what they selected before."""

from __future__ import annotations

import fnmatch
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.quantised_names import (
    KEPT,
    NAMES,
    NUM_EXPERTS,
    PATTERNS,
    PROJECTIONS,
    choices,
    module,
    renumbered,
)


def selected(field, entry, modules):
    """What an entry selects, by the definitions of the libraries."""
    if entry.startswith("re:"):
        return {name for name in modules if re.match(entry[3:], name)}
    if field == "exclude_modules" or entry.startswith("*"):
        return {name for name in modules if fnmatch.fnmatchcase(name, entry)}
    if field == "modules_to_not_convert":
        return {name for name in modules if re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name)}
    return {name for name in modules if name == entry}


def modules_of(names):
    return dict.fromkeys(name.rpartition(".")[0] for name in names)


def naive(found, kept):
    """The new names of modules, by taking them apart."""
    image = set()
    for name in found:
        parts = name.split(".")
        if "experts" in parts:
            layer, expert = int(parts[2]), int(parts[5])
            if expert not in kept[layer]:
                continue
            parts[5] = str(kept[layer].index(expert))
        image.add(".".join(parts))
    return image


def check_selection(field, entry, kept):
    after = naive(modules_of(NAMES), kept)
    edited = renumbered({field: [entry]}, kept=kept)[field]
    found = set().union(*(selected(field, one, after) for one in edited))
    assert found == naive(selected(field, entry, modules_of(NAMES)), kept)
    return edited


@pytest.mark.parametrize(("field", "entry"), PATTERNS)
def test_patterns_select_the_same_experts(field, entry):
    check_selection(field, entry, KEPT)


@pytest.mark.parametrize(("field", "entry"), PATTERNS)
def test_patterns_stay_when_all_experts_do(field, entry):
    keep_all = {layer: list(range(NUM_EXPERTS)) for layer in KEPT}
    assert check_selection(field, entry, keep_all) == [entry]


@given(st.fixed_dictionaries(dict.fromkeys(KEPT, choices)), st.sampled_from(PATTERNS))
def test_patterns_select_the_same_experts_whichever_stay(kept, pattern):
    check_selection(*pattern, kept)


@given(
    st.fixed_dictionaries(dict.fromkeys(KEPT, choices)),
    st.lists(
        st.tuples(st.sampled_from(list(KEPT)), st.integers(0, 11), st.sampled_from(PROJECTIONS))
    ),
)
def test_lists_and_keys_are_those_of_the_naive_model(kept, experts):
    names = [module(*expert) for expert in experts]
    expected = []
    for layer, expert, projection in experts:
        if expert in kept[layer]:
            name = module(layer, kept[layer].index(expert), projection)
            expected += [name] if name not in expected else []
    edited = renumbered({"ignore": names, "dynamic": {name: {"a": 1} for name in names}}, kept=kept)
    assert edited["ignore"] == expected
    # In `dynamic` a name is a pattern, whose dots are taken for dots.
    assert list(edited["dynamic"]) == expected
