from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap_stream.checkpoint.configedit import (
    edit_config,
    edit_side_file,
    mtp_layer_count,
    render_config,
)
from reap_stream.errors import CheckpointError, UnsupportedError

KEPT = {3: [0, 2, 3], 4: [1, 2, 3], 10: [0, 1, 3]}


def edit(config, count_paths=(), mtp_dropped=False):
    return edit_config(config, count_paths, (4, 3), KEPT, mtp_dropped=mtp_dropped)


def ignored(*entries):
    """What becomes of entries of compressed-tensors' `ignore` list."""
    config = {"num_hidden_layers": 10, "quantization_config": {"ignore": list(entries)}}
    return edit(config)["quantization_config"]["ignore"]


# ---- counts


@pytest.mark.parametrize(
    ("config", "path", "expected"),
    [
        ({"n_routed_experts": 4}, ("n_routed_experts",), {"n_routed_experts": 3}),
        (
            {"text_config": {"num_experts": 4, "x": 4}, "num_experts": 4},
            ("text_config", "num_experts"),
            {"text_config": {"num_experts": 3, "x": 4}, "num_experts": 4},
        ),
        ({"num_experts": [4, 4]}, ("num_experts",), {"num_experts": [3, 3]}),
    ],
)
def test_counts_are_replaced_where_they_stand(config, path, expected):
    before = copy.deepcopy(config)
    assert edit(config, [path]) == expected
    assert config == before


@pytest.mark.parametrize(
    ("config", "path", "match"),
    [
        ({}, ("num_experts",), "num_experts: missing"),
        ({"text_config": None}, ("text_config", "num_experts"), r"text_config\.num_experts: miss"),
        ({"num_experts": 8}, ("num_experts",), "is 8, but every layer has 4 experts"),
        ({"num_experts": [4, 0]}, ("num_experts",), r"is \[4, 0\]"),
        ({"num_experts": []}, ("num_experts",), r"is \[\]"),
        ({"num_experts": 4.0}, ("num_experts",), r"is 4\.0"),
        ({"num_experts": None}, ("num_experts",), "is None"),
    ],
)
def test_a_count_that_is_not_the_tensors_is_refused(config, path, match):
    with pytest.raises(UnsupportedError, match=match):
        edit(config, [path])


def test_everything_else_stays_in_its_order():
    text = (
        '{\n  "b": 1,\n  "n_routed_experts": 4,\n  "a": {\n    "z": null,\n    "y": [\n      1\n'
        '    ]\n  },\n  "rope_theta": 1000000.0,\n  "limit": Infinity,\n  "name": "模型"\n}\n'
    )
    expected = text.replace('"n_routed_experts": 4', '"n_routed_experts": 3')
    assert render_config(edit(json.loads(text), [("n_routed_experts",)])) == expected


# ---- next-token-prediction layers


@pytest.mark.parametrize(
    "key",
    ["num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "mtp_num_layers"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_counts_of_mtp_layers_become_zero_when_they_are_dropped(key, nested):
    part = {key: 2, "num_hidden_layers": 9, "mtp_loss_factor": 3, "use_mtp_layers": True}
    config = {"text_config": part} if nested else part
    assert mtp_layer_count(config) == 2
    edited = edit(config, mtp_dropped=True)
    assert mtp_layer_count(edited) == 0
    assert (edited["text_config"] if nested else edited) == {**part, key: 0}
    assert edit(config) == config


def test_a_config_without_mtp_layers_has_none():
    assert mtp_layer_count({"num_hidden_layers": 3, "mtp_layers": None}) == 0


# ---- names of modules


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("model.layers.3.mlp.experts.0.up_proj", ["model.layers.3.mlp.experts.0.up_proj"]),
        ("model.layers.3.mlp.experts.1.up_proj", []),
        ("model.layers.3.mlp.experts.2.up_proj", ["model.layers.3.mlp.experts.1.up_proj"]),
        ("model.layers.4.mlp.experts.3", ["model.layers.4.mlp.experts.2"]),
        ("layers.4.experts.3", ["layers.4.experts.2"]),
        (
            "model.language_model.layers.3.block_sparse_moe.experts.3.w2",
            ["model.language_model.layers.3.block_sparse_moe.experts.2.w2"],
        ),
        # Next-token-prediction layers of their own numbering follow the decoder's.
        ("mtp.layers.0.mlp.experts.3.up_proj", ["mtp.layers.0.mlp.experts.2.up_proj"]),
        ("mtp.layers.0.mlp.experts.2.up_proj", []),
    ],
)
def test_names_follow_their_experts(entry, expected):
    assert ignored(entry) == expected


@pytest.mark.parametrize(
    "entry",
    [
        "lm_head",
        "Linear",
        "model.layers.3.mlp.gate",
        "model.layers.3.mlp.experts",
        "model.layers.3.mlp.shared_experts.1.up_proj",
        "model.layers.3.mlp.shared_expert.up_proj",
        "model.layers.3.mlp.experts.gate_up_proj",
        "model.layers.5.mlp.experts.1.up_proj",
        "re:.*mlp.experts.*",
        r"re:.*mlp\.experts\..*\.w2$",
        r"re:.*experts.*w2",
        r"re:model\.layers\.3\.mlp\.experts\.\d+\.up_proj",
        r"re:model\.layers\.[0-2]\.mlp\.experts\.[0-9]+\.up_proj",
        r"re:.*experts\.(\d{1,3})\.down_proj",
        r"re:.*experts\.[^.]+\.down_proj",
        "*mlp.experts*",
        "model.layers.3.mlp.experts.*.gate_proj",
        r"re:.*self_attn.*|.*experts.*layers\.3\..*",
    ],
)
def test_other_entries_are_left_alone(entry):
    assert ignored("lm_head", entry, "lm_head2") == list(
        dict.fromkeys(["lm_head", entry, "lm_head2"])
    )


@pytest.mark.parametrize(
    "entry",
    [
        r"re:.*mlp\.experts\.5\..*",
        "re:.*mlp.experts.5.*",
        r"re:model\.layers\.3\.mlp\.experts\.(1|2)\.up_proj",
        r"re:.*experts\.[1-5]\..*",
        r"re:.*experts\.[0-9]\..*",
        r"re:.*experts\.\d\..*",
        r"re:.*experts\.1\d\..*",
        r"-:.*experts\.5\.up_proj",
        "model.layers.3.mlp.experts.1*",
        "*experts.1.*",
        r"re:.*(attn|experts\.3\.up_proj)$",
    ],
)
def test_patterns_that_name_experts_by_number_are_refused(entry):
    with pytest.raises(UnsupportedError, match="names experts by number") as caught:
        ignored("lm_head", entry)
    assert repr(entry) in str(caught.value)


@pytest.mark.parametrize("entry", ["experts.1", "mlp.experts.0.down_proj"])
def test_an_expert_of_no_certain_layer_is_refused(entry):
    with pytest.raises(UnsupportedError, match="no certain layer"):
        ignored(entry)


@given(
    st.lists(st.tuples(st.sampled_from([3, 4]), st.integers(0, 3), st.sampled_from("ab"))),
    st.lists(st.sampled_from(["lm_head", "re:.*gate$"]), unique=True),
)
def test_lists_keep_their_order_and_hold_nothing_twice(experts, others):
    names = [f"model.layers.{layer}.mlp.experts.{e}.{p}" for layer, e, p in experts]
    expected = []
    for layer, e, p in experts:
        if e in KEPT[layer]:
            name = f"model.layers.{layer}.mlp.experts.{KEPT[layer].index(e)}.{p}"
            if name not in expected:
                expected.append(name)
    assert ignored(*others, *names) == [*others, *expected]


def test_every_field_is_renumbered_wherever_it_lies():
    def settings(expert):
        name = f"model.layers.4.mlp.experts.{expert}.up_proj"
        return {
            "quant_method": "fp8",
            "weight_block_size": [128, 128, None],
            "modules_to_not_convert": ["lm_head", name],
            "ignored_layers": [name],
            "config_groups": {"group_0": {"targets": ["Linear", name], "weights": {"bits": 8}}},
            "sparsity_config": {"ignore": [name]},
            "quantized_layers": {name: {"quant_algo": "FP8"}, "lm_head": {}},
        }

    before = {
        "quantization_config": settings(3),
        "text_config": {"compression_config": settings(2), "other": settings(2)},
    }
    after = {
        "quantization_config": settings(2),
        "text_config": {"compression_config": settings(1), "other": settings(2)},
    }
    assert edit(before) == after


def test_a_removed_expert_takes_its_key_along():
    layers = {f"model.layers.4.mlp.experts.{e}.up_proj": {"e": e} for e in range(4)}
    edited = edit({"quantization_config": {"quantized_layers": layers}})
    assert edited["quantization_config"]["quantized_layers"] == {
        f"model.layers.4.mlp.experts.{slot}.up_proj": {"e": e} for slot, e in enumerate(KEPT[4])
    }


def test_an_expert_named_outside_a_list_is_refused():
    config = {"quantization_config": {"first": "model.layers.4.mlp.experts.3"}}
    with pytest.raises(UnsupportedError, match=r"quantization_config\.first.*outside a list"):
        edit(config)


def test_fields_outside_the_quantisation_settings_are_not_touched():
    config = {"keep_in_fp32": ["model.layers.4.mlp.experts.3"], "quantization_config": None}
    assert edit(config) == config


def test_side_files_are_renumbered_only_where_they_name_experts(tmp_path):
    path = tmp_path / "hf_quant_config.json"
    raw = b'{"quantization":{"exclude_modules":["lm_head","model.layers.4.mlp.experts.3"]}}'
    edited = json.loads(edit_side_file(raw, path, {}, KEPT))
    assert edited == {
        "quantization": {"exclude_modules": ["lm_head", "model.layers.4.mlp.experts.2"]}
    }
    untouched = b'{"quantization":  {"exclude_modules": ["lm_head"]}}'
    assert edit_side_file(untouched, path, {}, KEPT) is untouched
    with pytest.raises(UnsupportedError, match=r"hf_quant_config\.json.*by number"):
        edit_side_file(b'{"a": ["*experts.1.*"]}', path, {}, KEPT)
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json"):
        edit_side_file(b"[", path, {}, KEPT)
