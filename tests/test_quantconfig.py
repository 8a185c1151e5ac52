"""Quantisation settings after pruning: each method's fields, and a naive model of what they mean."""

from __future__ import annotations

import copy
import fnmatch
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap_stream.checkpoint.configedit import edit_config, edit_side_file
from reap_stream.checkpoint.mixed_precision import mixed_layers
from reap_stream.checkpoint.strict_json import parse_object
from reap_stream.errors import CheckpointError, UnsupportedError

NUM_EXPERTS = 12
NUM_LAYERS = 12
# Layer 0 is dense, 12 the prediction layer; numbers of one and of two digits change places.
KEPT = {1: [0, 2, 3, 10], 2: [1, 4, 10, 11], 11: [5, 6, 7, 8], 12: [0, 1, 10, 11]}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def module(layer, expert, projection="up_proj"):
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}"


NAMES = [
    "lm_head.weight",
    *(f"model.layers.{layer}.self_attn.q_proj.qweight" for layer in range(13)),
    *(f"model.layers.{layer}.mlp.gate.weight" for layer in KEPT),
    *(
        f"{module(layer, expert, projection)}.{suffix}"
        for layer in KEPT
        for expert in range(NUM_EXPERTS)
        for projection in PROJECTIONS
        for suffix in ("qweight", "scales")
    ),
]


def renumbered(settings, names=NAMES, kept=KEPT, mtp_dropped=False):
    config = {"num_hidden_layers": NUM_LAYERS, "quantization_config": settings}
    edited = edit_config(config, (), (12, 4), kept, names=names, mtp_dropped=mtp_dropped)
    return edited["quantization_config"]


def new(layer, expert, projection="up_proj"):
    """The new name of a kept expert."""
    return module(layer, KEPT[layer].index(expert), projection)


# ---- the fields of each method

FIELDS = {
    "fp8": lambda names: {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", *names]},
    "fp8 other name": lambda names: {"ignored_layers": names},
    "compressed-tensors": lambda names: {
        "ignore": ["lm_head", *names],
        "config_groups": {
            "group_0": {"targets": names, "weights": {"num_bits": 4, "group_size": 32}},
            "group_1": {"targets": ["Linear"], "weights": {"num_bits": 8}},
        },
        "sparsity_config": {"ignore": names, "targets": ["Linear", *names]},
        "transform_config": {
            "config_groups": {"R1": {"apply": [{"targets": names, "ignore": ["lm_head"]}]}}
        },
    },
    "modelopt": lambda names: {
        "quant_algo": "MIXED_PRECISION",
        "ignore": names,
        "exclude_modules": ["lm_head", *names],
        "quantized_layers": {name: {"quant_algo": "FP8"} for name in names},
    },
    "gptq": lambda names: {
        "bits": 4,
        "dynamic": {
            **{f"-:{re.escape(name)}": {} for name in names[:1]},
            **{f"+:^{re.escape(name)}$": {"bits": 8} for name in names[1:]},
            r".*\.experts\..*": {"bits": 4},
        },
        "modules_in_block_to_quantize": [["self_attn.q_proj"], names],
    },
    "awq": lambda names: {"quant_method": "awq", "modules_to_not_convert": ["mlp.gate", *names]},
    "quark": lambda names: {
        "exclude": names,
        "layer_quant_config": {name: {"weight": {"dtype": "fp8"}} for name in names},
    },
    "auto-round": lambda names: {
        "extra_config": {name: {"bits": 16} for name in names},
        "block_name_to_quantize": ",".join(["model.layers", *names]),
        "to_quant_block_names": [names, ["model.layers"]],
    },
    "torchao": lambda names: {
        "quant_type": {"default": {"_data": {"module_fqn_to_config": dict.fromkeys(names, 1)}}}
    },
}


@pytest.mark.parametrize("method", FIELDS)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
@pytest.mark.parametrize("part", [(), ("text_config",), ("thinker_config", "text_config")])
def test_every_field_of_every_method_follows(method, key, part):
    before = [module(1, 10), module(1, 1), module(2, 11, "w2"), module(12, 1), module(11, 0)]
    after = [new(1, 10), new(2, 11, "w2"), new(12, 1)]
    fields = FIELDS[method]

    def config(names):
        document = {key: fields(names), "num_hidden_layers": NUM_LAYERS}
        for folder in reversed(part):
            document = {folder: document}
        return {"other": before, **document}

    source, expected = config(before), config(after)
    if method == "gptq":
        # The first of the names, which the others' sign differs from, is still the first.
        assert next(iter(FIELDS["gptq"](after)["dynamic"])).startswith("-:")
    edited = edit_config(source, (), (12, 4), KEPT, names=NAMES)
    assert edited == expected
    assert json.dumps(edited) == json.dumps(expected)
    assert source == config(before)


@pytest.mark.parametrize(
    "filename",
    [
        "hf_quant_config.json",
        "quantize_config.json",
        "quant_config.json",
        "quantization_config.json",
    ],
)
@pytest.mark.parametrize("method", FIELDS)
def test_side_files_follow(filename, method, tmp_path):
    fields = FIELDS[method]
    raw = json.dumps({"quantization": fields([module(1, 10), module(1, 1)])}).encode()
    path = tmp_path / filename
    config = {"num_hidden_layers": NUM_LAYERS}
    edited = edit_side_file(raw, path, config, KEPT, NAMES)
    assert json.loads(edited) == {"quantization": fields([new(1, 10)])}
    keep_all = {layer: range(NUM_EXPERTS) for layer in KEPT}
    assert edit_side_file(raw, path, config, keep_all, NAMES) is raw


# ---- names


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("model.layers.01.mlp.experts.1.up_proj", ["model.layers.01.mlp.experts.1.up_proj"]),
        ("model.layers.1.mlp.experts.01.up_proj", ["model.layers.1.mlp.experts.01.up_proj"]),
        ("model.layers.1.mlp.experts.٣.up_proj", ["model.layers.1.mlp.experts.٣.up_proj"]),
        (f"model.layers.1.mlp.experts.{'9' * 5000}", [f"model.layers.1.mlp.experts.{'9' * 5000}"]),
        ("model.layers.1.mlp.experts.12.up_proj", []),
        ("model.layers.0.mlp.experts.1.up_proj", ["model.layers.0.mlp.experts.1.up_proj"]),
        ("layers.1.ffn.experts.3.w1", ["layers.1.ffn.experts.2.w1"]),
        ("mtp.0.ffn.experts.10.w1", ["mtp.0.ffn.experts.2.w1"]),
        ("model.layers.1.mlp.shared_experts.1", ["model.layers.1.mlp.shared_experts.1"]),
        ("", [""]),
        (".experts.", [".experts."]),
        ("experts", ["experts"]),
    ],
)
def test_only_an_experts_own_number_changes(entry, expected):
    assert renumbered({"ignore": [entry]}) == {"ignore": expected}


def test_entries_of_a_dropped_prediction_layer_go():
    names = [
        module(12, 0),
        module(11, 5),
        "model.layers.12.eh_proj",
        "mtp.layers.0.mlp.experts.1.x",
    ]
    kept = {layer: experts for layer, experts in KEPT.items() if layer != 12}
    assert renumbered({"ignore": names}, kept=kept, mtp_dropped=True) == {
        "ignore": [module(11, 0), "model.layers.12.eh_proj"]
    }


BLOCK = [f"mlp.experts.{expert}.{p}" for expert in range(NUM_EXPERTS) for p in ("w1", "w2")]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # All of them in every layer: as many as are left in every layer.
        (BLOCK, [f"mlp.experts.{expert}.{p}" for expert in range(4) for p in ("w1", "w2")]),
        ([BLOCK[::2], BLOCK[1::2]], [BLOCK[:8:2], BLOCK[1:8:2]]),
        ([["self_attn.q_proj"], ["mlp.experts.9.w1"]], [["self_attn.q_proj"]]),
    ],
)
def test_names_inside_a_block_speak_of_every_layer(names, expected):
    edited = renumbered({"modules_in_block_to_quantize": names})
    assert edited == {"modules_in_block_to_quantize": expected}


def test_an_expert_of_every_layer_is_written_out_where_its_numbers_differ():
    assert renumbered({"ignore": ["experts.10.up_proj", "lm_head"]}) == {
        "ignore": [new(layer, 10) for layer in (1, 2, 12)] + ["lm_head"]
    }
    with pytest.raises(UnsupportedError, match=r"'experts\.10\.up_proj' names an expert of no cer"):
        renumbered({"ignore": ["experts.10.up_proj"]}, names=())


# ---- patterns: after pruning they select the new names of what they selected before

PATTERNS = [
    ("ignore", r"re:.*mlp\.experts\.5\..*"),
    ("ignore", r"re:.*\.experts\.1\d\..*"),
    ("ignore", r"re:model\.layers\.1\.mlp\.experts\.(1|2|10)\.up_proj"),
    ("ignore", r"re:model\.layers\.1\.mlp\.experts\.10\.up_proj"),
    ("ignore", r"re:^model\.layers\.1\.mlp\.experts\.10\..*$"),
    ("ignore", "re:model.layers.1.mlp.experts.10.up_proj"),
    ("ignore", r"re:.*layers\.(1|2)\..*experts\.\d\.(up|gate)_proj"),
    ("ignore", r"re:.*experts\.[1-5]\."),
    ("ignore", r"re:.*experts\..\.down_proj"),
    ("ignore", r"re:model\.layers\.1\.mlp\.experts\.1"),
    ("ignore", "re:model.layers.1.mlp.experts.1..*"),
    ("exclude_modules", "model.layers.1.mlp.experts.1*"),
    ("exclude_modules", "*experts.10.*"),
    ("exclude_modules", "*layers.1.mlp.experts.10.*"),
    ("exclude_modules", "*experts.?.up_proj"),
    ("exclude_modules", "*experts.[0-4].up_proj"),
    ("modules_to_not_convert", r"model.layers.1.mlp.experts.(2|3).up_proj"),
    ("modules_to_not_convert", r"model.layers.2.mlp.experts.1+\."),
    ("ignore", "re:.*experts.*"),
    ("ignore", r"re:.*experts\.\d+\.up_proj"),
    ("ignore", r"re:.*layers\.1\.mlp\.experts\.[0-9]+\.w2"),
    ("ignore", r"re:.*self_attn.*"),
    ("exclude_modules", "*mlp.experts*"),
    ("exclude_modules", "model.layers.1.*"),
    ("modules_to_not_convert", "*mlp.experts*"),
]


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


choices = st.lists(st.integers(0, 11), min_size=4, max_size=4, unique=True).map(sorted)


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
def test_what_is_refused_is_refused_before_anything_is_chosen(kept, wanted, with_names):
    """The job is checked with one choice and written with another."""
    names = NAMES if with_names else ()
    ends = (list(range(4)), list(range(8, 12)))
    supposed = {layer: ends[place % 2] for place, layer in enumerate(KEPT)}
    try:
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


# ---- malformed settings


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


# ---- mixed precision


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
