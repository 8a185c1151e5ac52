"""Quantisation settings follow the experts: the fields of each method, and names in them."""

from __future__ import annotations

import json
import re

import pytest

from reap_stream.checkpoint.configedit import edit_config, edit_side_file
from reap_stream.errors import UnsupportedError
from tests.quantised_names import KEPT, NAMES, NUM_EXPERTS, NUM_LAYERS, module, new, renumbered

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
