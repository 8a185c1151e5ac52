"""Packed weights and settings that do not fit each other are refused."""

from __future__ import annotations

import pytest
import torch

from reap_stream.errors import CheckpointError
from reap_stream.formats import group_weights, known_formats
from tests.packed_weights import decoded, fused_mxfp4, matrix, refs_of, weight_of
from tests.quantisers import PACKINGS, compressed, fp8_block, mxfp4


def changed(packing, **changes):
    """Tensors of a format with some replaced; None: left out."""
    tensors, _ = PACKINGS[packing].quantise(matrix())
    tensors.update(changes)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


INTS = {"dtype": torch.int32}
REFUSED = [
    ("int4", {"weight_scale": None}, "'m.weight_packed' has no scale"),
    ("int4", {"weight_scale": torch.ones(48, 2)}, r"\[48, 12\].*'m.weight_scale' \[48, 2\]"),
    ("int4", {"weight_scale": torch.ones(47, 3)}, r"\[47, 3\] is none of .*groups of 32"),
    ("int4", {"weight_packed": torch.zeros(48, 11, **INTS)}, r"\[48, 11\] with scale"),
    ("int4-zero-points", {"weight_zero_point": None}, "has no zero point"),
    (
        "int4-zero-points",
        {"weight_zero_point": torch.zeros(5, 3, **INTS)},
        r"I32 \[5, 3\], expected I32 \[6, 3\] or I8 \[48, 3\]",
    ),
    ("int4", {"weight_g_idx": torch.zeros(95, **INTS)}, r"I32 \[95\], expected I32 \[96\]"),
    ("nvfp4", {"weight_global_scale": None}, "no scale m.weight_global_scale"),
    ("nvfp4", {"weight_global_scale": torch.ones(2)}, r"F32 \[2\], expected F32 of one"),
    (
        "nvfp4",
        {"weight_packed": torch.zeros(48, 40, dtype=torch.uint8)},
        r"\[48, 40\] with scale 'm.weight_scale' \[48, 6\]",
    ),
    ("nvfp4-modelopt", {"weight_scale_2": None}, "no scale m.weight_scale_2"),
    ("mxfp4", {"weight_scale": None}, "'m.weight_packed' has no scale"),
    (
        "mxfp4",
        {"weight_packed": torch.zeros(48, 72, dtype=torch.uint8)},  # six bits a code
        r"\[48, 72\] with scale 'm.weight_scale' \[48, 3\]",
    ),
    ("mxfp8", {"weight_scale": None}, "'m.weight' has no scale"),
    ("mxfp8", {"weight_scale": torch.ones(48, 5, dtype=torch.uint8)}, r"\[48, 5\]"),
]


@pytest.mark.parametrize(("packing", "changes", "match"), REFUSED, ids=[r[2] for r in REFUSED])
def test_what_does_not_fit_is_refused(packing, changes, match):
    weight = weight_of(changed(packing, **changes), PACKINGS[packing].settings)
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(weight.format.refusal(weight))


def test_fused_blocks_that_do_not_fit_are_refused():
    tensors = fused_mxfp4()
    cases = [
        ({"gate_up_proj_scales": None}, "has no scales"),
        ({"gate_up_proj_scales": torch.zeros(3, 20, 1, dtype=torch.uint8)}, r"\[3, 20, 1\].*\[3, 20, 2\]"),
        ({"gate_up_proj_blocks": torch.zeros(3, 20, 2, 8, dtype=torch.uint8)}, r"\[3, 20, 2, 8\]"),
    ]  # fmt: skip
    for changes, match in cases:
        left = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        weight = group_weights(refs_of(left), known_formats({}))["gate_up_proj"]
        with pytest.raises(AssertionError, match=match):
            raise AssertionError(weight.format.refusal(weight))


@pytest.mark.parametrize(
    ("quantization", "match"),
    [
        (None, "no config_groups of integer weights"),
        (compressed("pack-quantized", num_bits=2, type="int", group_size=64), "2 bits, not 4 or 8"),
        (
            compressed("pack-quantized", num_bits=4, type="int", group_size=64),
            "4 bits in groups of 64",
        ),
    ],
)
def test_codes_that_the_config_does_not_explain_are_refused(quantization, match):
    weight = weight_of(changed("int4"), quantization)
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(weight.format.refusal(weight))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weight_shape": torch.tensor([48, 95])}, r"'m.weight_shape' says \[48, 95\].*\[48, 96\]"),
        ({"weight_g_idx": torch.full((96,), 3, **INTS)}, "names groups 3 to 3.* has 3"),
    ],
)
def test_values_that_contradict_the_shapes_end_the_run(changes, match):
    tensors = changed("int4", **changes)
    weight = weight_of(tensors, PACKINGS["int4"].settings)
    with pytest.raises(CheckpointError, match=match):
        decoded(weight, tensors, torch.float32)


def test_of_several_schemes_the_one_that_fits_holds():
    settings_ = {
        "config_groups": {
            "a": {"weights": {"num_bits": 8, "type": "int", "group_size": 32}},
            "b": {"weights": {"num_bits": 8, "type": "float", "block_structure": "24x24"}},
            "c": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}},
        }
    }
    for packing in ("int4", "fp8-block"):
        tensors, meant = PACKINGS[packing].quantise(matrix())
        assert torch.equal(decoded(weight_of(tensors, settings_), tensors, torch.float32), meant)


def test_settings_of_a_model_of_several_parts():
    tensors, meant = PACKINGS["int4"].quantise(matrix())
    config = {"text_config": {"quantization_config": PACKINGS["int4"].settings}}
    named = {f"m.{suffix}": tensor for suffix, tensor in tensors.items()}
    weight = group_weights(refs_of(named), known_formats(config))["m.weight"]
    assert torch.equal(decoded(weight, tensors, torch.float32), meant)


@pytest.mark.parametrize(
    "quantization",
    [
        [],
        "fp8",
        {"config_groups": ["a"]},
        {"config_groups": {"a": {"weights": {"num_bits": "4"}}}},
        {"config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 3.5}}}},
        {"config_groups": {"a": {"weights": {"num_bits": 8, "block_structure": "128"}}}},
        {"config_groups": {"a": {"weights": {"num_bits": 8, "block_structure": [128, 0]}}}},
    ],
    ids=str,
)
def test_malformed_settings_are_refused(quantization):
    if quantization == []:
        assert known_formats({"quantization_config": None})
        return
    with pytest.raises(CheckpointError, match=r"config\.json"):
        known_formats({"quantization_config": quantization})


def test_a_weight_in_two_formats_is_refused():
    tensors, _ = PACKINGS["int4"].quantise(matrix())
    named = {f"m.{suffix}": tensor for suffix, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=r"'m.weight' is there twice.*BF16.*I32|I32.*BF16"):
        group_weights(
            refs_of({**named, "m.weight": torch.zeros(48, 96, dtype=torch.bfloat16)}),
            known_formats({}),
        )


def test_names_of_scales_are_the_published_ones():
    """DeepSeek-V4 writes `Y.scale`; both kinds of its weights lie in one checkpoint."""
    dense, _ = fp8_block(128, torch.float8_e8m0fnu, "scale")(matrix())
    expert, _ = mxfp4("weight", "scale", tagged=True)(matrix())
    for tensors, name in ((dense, "fp8"), (expert, "mxfp4")):
        weight = weight_of(tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]})
        assert weight.format.name == name
        assert weight.format.refusal(weight) is None
