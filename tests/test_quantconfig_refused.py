"""Quantisation settings that cannot be renumbered, are malformed, or treat experts differently."""

from __future__ import annotations

import copy
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reap_stream.checkpoint.configedit import edit_config, edit_side_file
from reap_stream.checkpoint.mixed_precision import mixed_layers
from reap_stream.checkpoint.strict_json import parse_object
from reap_stream.errors import CheckpointError, UnsupportedError
from reap_stream.pruning import supposed_choices
from tests.quantised_names import (
    KEPT,
    NAMES,
    NUM_EXPERTS,
    NUM_LAYERS,
    PATTERNS,
    PROJECTIONS,
    choices,
    module,
    renumbered,
)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"ignore": [r"re:.*(q_proj|experts\.3\.up_proj)$"]}, r"by number and 'model\.layers\.0\."),
        ({"ignore": [r"re:.*\.1\..*_proj"]}, r"by number and 'model\.layers\.1\.self_attn"),
        (
            {"modules_to_not_convert": ["model.layers.(2).mlp.experts.1"]},
            "selects other experts",
        ),
        ({"ignore": r"re:.*experts\.5\..*"}, "outside a list"),
        ({"ignore": module(1, 3)}, "outside a list"),
        ({"ignore": [r"re:(.*)*experts\.5\..*"]}, "by number"),
        ({"ignore": [r"re:.*.*.*.*.*experts\.5\..*"]}, "by number"),
        ({"ignore": [r"re:.*experts\.5\.(.*"]}, "by number"),
        (
            {
                "config_groups": {
                    "a": {"targets": [r"re:.*experts\.(5|10)\.up_proj"]},
                    "b": {"targets": [module(1, 10)]},
                }
            },
            "names too",
        ),
    ],
)
def test_what_cannot_be_written_otherwise_is_refused(settings, match):
    with pytest.raises(UnsupportedError, match=match):
        renumbered(settings)


REFUSABLE = [
    *({field: [entry]} for field, entry in PATTERNS),
    {"ignore": [r"re:.*(q_proj|experts\.3\.up_proj)$"]},
    {"ignore": ["experts.5.up_proj"]},
    {"ignore": ["other.experts.5.up_proj"]},
    {"ignore": module(1, 3)},
    {"modules_to_not_convert": ["model.layers.(2).mlp.experts.1"]},
    {
        "config_groups": {
            "a": {"targets": [r"re:.*\.[37]\.up_proj"]},
            "b": {"targets": [module(1, 3)]},
        }
    },
]


@given(
    st.fixed_dictionaries(dict.fromkeys(KEPT, choices)),
    st.sampled_from(REFUSABLE),
    st.booleans(),
)
@example(
    {**{layer: [0, 1, 2, 3] for layer in KEPT}, 12: [0, 1, 2, 5]},
    {"ignore": ["experts.5.up_proj"]},
    False,
)
def test_what_is_refused_is_refused_before_anything_is_chosen(kept, wanted, with_names):
    """The job is checked with one choice and written with another."""
    names = NAMES if with_names else ()
    try:
        for supposed in supposed_choices(list(KEPT), 12, 4):
            renumbered(wanted, names=names, kept=supposed)
    except UnsupportedError:
        return
    renumbered(wanted, names=names, kept=kept)


def test_the_first_match_still_wins():
    """GPTQModel tries `dynamic` in turn: what an earlier key takes, a later one does not get."""
    before = {
        r"-:.*layers\.1\..*": {"who": 0},
        r"+:.*experts\.(1|10)\..*": {"who": 1},
        rf"+:{re.escape(module(2, 11))}": {"who": 2},
        r".*experts\.\d\..*": {"who": 3},
        r".*": {"who": 4},
    }
    after = renumbered({"dynamic": before})["dynamic"]

    def winner(rules, name):
        return next(v["who"] for k, v in rules.items() if re.match(re.sub("^[+-]:", "", k), name))

    for layer, experts in KEPT.items():
        for slot, expert in enumerate(experts):
            for projection in PROJECTIONS:
                old = winner(before, module(layer, expert, projection))
                assert winner(after, module(layer, slot, projection)) == old


def test_a_group_that_is_left_without_targets_goes():
    groups = {
        "gone": {"targets": [module(1, 1)], "weights": {"num_bits": 8}},
        "stays": {"targets": ["Linear"], "weights": {"num_bits": 4}},
        "was_empty": {"targets": []},
    }
    edited = renumbered({"config_groups": copy.deepcopy(groups)})["config_groups"]
    assert edited == {name: groups[name] for name in ("stays", "was_empty")}


@pytest.mark.parametrize(
    "settings",
    [
        None,
        [],
        "fp8",
        7,
        [[[]]],
        {"ignore": {"a": [None, 1, True, {}]}},
        {"ignore": None, "config_groups": []},
        {"config_groups": {"a": None, "b": {"targets": "Linear"}, "c": {"targets": [1, None]}}},
        {"dynamic": {"": {}, "-:": None, "+:(": {}, "re:[": {}}},
        {"ignore": ["re:", "re:(?P<x>", "re:" + "a" * 20_000, "[", "\\"]},
    ],
)
def test_malformed_settings_stay_as_they_are(settings):
    assert renumbered(settings) == settings


@pytest.mark.parametrize("depth", [70, 900])
def test_deep_nesting_is_refused(depth, tmp_path):
    raw = b'{"quantization_config":' + b"[" * depth + b"]" * depth + b"}"
    config = parse_object(raw, tmp_path)
    with pytest.raises(CheckpointError, match="nested more than 64 levels"):
        edit_config(config, (), (12, 4), KEPT)
    with pytest.raises(CheckpointError, match="nested more than 64 levels"):
        edit_side_file(raw, tmp_path / "quantize_config.json", {}, KEPT)


@pytest.mark.parametrize(
    "pattern",
    [
        "re:(a+)+$",
        "re:" + ".*" * 30 + "x",
        "re:" + "a?" * 40 + "a" * 40,
        "*" * 200 + "x",
        "re:(.|.)*z",
    ],
)
def test_patterns_that_would_take_for_ever_do_not(pattern):
    names = [module(1, 0, "a" * 100) + ".weight", *NAMES]
    assert renumbered({"ignore": [pattern], "exclude": [pattern]}, names=names) == {
        "ignore": [pattern],
        "exclude": [pattern],
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ignore": ["lm_head", "model.layers.1.mlp.gate"]}, []),
        ({"ignore": [module(1, expert) for expert in range(NUM_EXPERTS)]}, []),
        ({"ignore": [module(1, 3), module(11, 0)]}, [1, 11]),
        ({"ignore": [module(12, expert) for expert in range(11)]}, [12]),
        ({"ignore": ["model.layers.2.mlp.experts.3"]}, [2]),
        ({"ignore": [f"model.layers.2.mlp.experts.{e}" for e in range(12)]}, []),
        ({"quantized_layers": {module(1, e): {"bits": 4} for e in range(12)}}, []),
        ({"quantized_layers": {module(1, e): {"bits": 4 + 4 * (e > 5)} for e in range(12)}}, [1]),
        # Layer 0 has no experts: what is said of them means nothing.
        ({"ignore": [module(0, 3)]}, []),
        (None, []),
    ],
)
def test_layers_of_mixed_precision_are_found(settings, expected):
    assert mixed_layers(settings, NAMES, NUM_LAYERS) == expected
