"""Packed formats against the libraries that own them, and against naive quantisers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.errors import CheckpointError
from reap_stream.formats import TORCH_DTYPES, group_weights, known_formats, member
from reap_stream.formats.scales import e4m3_values, e8m0_values
from tests.quantisers import PACKINGS, compressed, fp8_block, mxfp4, pack_words, packed_int

TAGS = {dtype: tag for tag, dtype in TORCH_DTYPES.items()}
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def refs_of(tensors):
    return {
        name: TensorRef(
            name,
            Path("model.safetensors"),
            TAGS[t.dtype],
            tuple(t.shape),
            0,
            t.numel() * t.itemsize,
        )
        for name, t in tensors.items()
    }


def weight_of(tensors, quantization=None):
    """The one weight `m.weight` that the tensors make, by their names behind `m.`."""
    config = {} if quantization is None else {"quantization_config": quantization}
    named = {f"m.{suffix}": tensor for suffix, tensor in tensors.items()}
    return group_weights(refs_of(named), known_formats(config))["m.weight"]


def decoded(weight, tensors, dtype):
    parts = {role: tensors[ref.name.removeprefix("m.")] for role, ref in weight.parts.items()}
    assert weight.format.refusal(weight) is None
    out = weight.empty(dtype, torch.device("cpu"))
    weight.format.decode(weight, parts, out)
    return out


def matrix(rows=48, columns=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_values_are_what_the_quantiser_meant(packing, dtype):
    tensors, meant = PACKINGS[packing].quantise(matrix())
    weight = weight_of(tensors, PACKINGS[packing].settings)
    assert (weight.name, weight.shape) == ("m.weight", (48, 96))
    assert not weight.is_plain
    assert torch.equal(decoded(weight, tensors, dtype), meant.to(dtype))


@pytest.mark.parametrize("packing", PACKINGS)
def test_what_lies_beside_codes_is_no_weight_of_its_own(packing):
    tensors, _ = PACKINGS[packing].quantise(matrix())
    config = {"quantization_config": PACKINGS[packing].settings}
    weights = group_weights(
        refs_of({f"m.{suffix}": tensor for suffix, tensor in tensors.items()}),
        known_formats(config),
    )
    assert set(weights) <= {"m.weight", "m.input_scale", "m.input_global_scale"}


@pytest.mark.parametrize("packing", PACKINGS)
def test_decoding_into_part_of_a_larger_matrix(packing):
    tensors, meant = PACKINGS[packing].quantise(matrix())
    weight = weight_of(tensors, PACKINGS[packing].settings)
    parts = {role: tensors[ref.name.removeprefix("m.")] for role, ref in weight.parts.items()}
    whole = torch.zeros(48, 120)
    weight.format.decode(weight, parts, whole[:, 8:104])
    assert torch.equal(whole[:, 8:104], meant)
    assert not whole[:, :8].any()
    assert not whole[:, 104:].any()


@settings(max_examples=40, deadline=None)
@given(
    packing=st.sampled_from(list(PACKINGS)),
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_any_shape(packing, rows, groups, seed):
    source = matrix(rows, 32 * groups, seed)
    tensors, meant = PACKINGS[packing].quantise(source)
    weight = weight_of(tensors, PACKINGS[packing].settings)
    assert torch.equal(decoded(weight, tensors, torch.float32), meant)


def scheme_of(settings_):
    """compressed-tensors' own reading of the settings."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    weights = settings_["config_groups"]["group_0"]["weights"]
    return quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**weights)
    )


def by_compressed_tensors(packing, tensors, settings_):
    base = pytest.importorskip("compressed_tensors.compressors.base")
    compressor = base.BaseCompressor.get_value_from_registry(packing)
    return compressor.decompress(dict(tensors), scheme_of(settings_))["weight"]


OWNED = {
    "int4": "pack-quantized",
    "int4-zero-points": "pack-quantized",
    "int8-channel": "pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "fp8-block": "float-quantized",
}


@pytest.mark.parametrize("packing", OWNED)
def test_values_are_those_of_compressed_tensors(packing):
    tensors, _ = PACKINGS[packing].quantise(matrix(seed=3))
    settings_ = PACKINGS[packing].settings
    expected = by_compressed_tensors(OWNED[packing], tensors, settings_)
    assert expected.dtype == torch.bfloat16
    weight = weight_of(tensors, settings_)
    assert torch.equal(decoded(weight, tensors, torch.bfloat16), expected)
    # With float32 scales it computes in float32, as this package always does.
    wide = {k: t.float() if t.dtype == torch.bfloat16 else t for k, t in tensors.items()}
    if wide["weight_scale"].dtype == torch.float32:
        expected = by_compressed_tensors(OWNED[packing], wide, settings_)
        assert torch.equal(decoded(weight_of(wide, settings_), wide, torch.float32), expected)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [(4, 32, True), (4, 16, False), (4, None, False), (8, 32, True), (8, None, False)],
)
def test_what_compressed_tensors_packs_is_read_back(bits, group, symmetric):
    base = pytest.importorskip("compressed_tensors.compressors.base")
    strategy = (
        {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    )
    settings_ = compressed(
        "pack-quantized", num_bits=bits, type="int", **{"symmetric": symmetric, **strategy}
    )
    source = matrix(40, 64, seed=5)
    scale = torch.rand(40, 1 if group is None else 64 // group) * 0.02 + 0.01
    zero = torch.randint(-2, 3, scale.shape).to(torch.int8) * (not symmetric)
    state = {"weight": source, "weight_scale": scale, "weight_zero_point": zero}
    compressor = base.BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = compressor.compress(state, scheme_of(settings_))
    assert ("weight_zero_point" in tensors) == (not symmetric)
    expected = compressor.decompress(dict(tensors), scheme_of(settings_))["weight"]
    got = decoded(weight_of(tensors, settings_), tensors, torch.float32)
    assert torch.equal(got, expected)
    assert (got - source).abs().max() < 0.5


def test_unpacked_zero_points_of_older_files():
    tensors, meant = PACKINGS["int4-zero-points"].quantise(matrix())
    words = tensors["weight_zero_point"].view(torch.uint32).long()
    codes = (words[:, None] >> (torch.arange(8) * 4)[None, :, None]) & 15
    tensors["weight_zero_point"] = (codes.reshape(48, -1) - 8).to(torch.int8)
    weight = weight_of(tensors, PACKINGS["int4-zero-points"].settings)
    assert torch.equal(decoded(weight, tensors, torch.float32), meant)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [False, True])
def test_groups_in_the_order_of_activations(bits, zero):
    source = matrix(16, 128, seed=7)
    order = torch.arange(128).div(32, rounding_mode="floor")[torch.randperm(128)]
    # Quantised with its columns sorted by group, then put back.
    places = torch.argsort(order, stable=True)
    tensors, meant = packed_int(bits, 32, zero=zero)(source[:, places])
    words = tensors["weight_packed"].view(torch.uint32).long()
    codes = (words[..., None] >> (torch.arange(32 // bits) * bits)) & ((1 << bits) - 1)
    back = torch.argsort(places)
    tensors["weight_packed"] = pack_words(codes.reshape(16, 128)[:, back], bits)
    tensors["weight_g_idx"] = order.to(torch.int32)
    settings_ = compressed(
        "pack-quantized",
        num_bits=bits,
        type="int",
        group_size=32,
        symmetric=not zero,
    )
    weight = weight_of(tensors, settings_)
    assert torch.equal(decoded(weight, tensors, torch.float32), meant[:, back])
    tensors["weight_g_idx"] = torch.full((128,), -1, dtype=torch.int32)
    sorted_tensors, meant = packed_int(bits, 32, zero=zero)(source)
    sorted_tensors["weight_g_idx"] = tensors["weight_g_idx"]
    weight = weight_of(sorted_tensors, settings_)
    assert torch.equal(decoded(weight, sorted_tensors, torch.float32), meant)


def fused_mxfp4(experts=3, channels=20, columns=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (experts, channels, columns // 32)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8)
    return {"gate_up_proj_blocks": blocks, "gate_up_proj_scales": scales}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_mxfp4_is_transformers_dequantisation(dtype):
    tensors = fused_mxfp4()
    weights = group_weights(refs_of(tensors), known_formats({}))
    assert set(weights) == {"gate_up_proj"}
    weight = weights["gate_up_proj"]
    expected = convert_moe_packed_tensors(*tensors.values(), dtype=dtype)
    assert weight.shape == tuple(expected.shape) == (3, 64, 20)
    assert weight.format.refusal(weight) is None
    parts = {"codes": tensors["gate_up_proj_blocks"], "scale": tensors["gate_up_proj_scales"]}
    for out in (weight.empty(dtype, torch.device("cpu")), torch.empty(weight.shape, dtype=dtype)):
        weight.format.decode(weight, parts, out)
        assert torch.equal(out, expected)
    for expert in range(3):
        own = member(weight, expert)
        out = own.empty(dtype, torch.device("cpu"))
        own.format.decode(own, {role: part[expert] for role, part in parts.items()}, out)
        assert torch.equal(out, expected[expert])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", ["mxfp4-deepseek", "fp8-e8m0", "mxfp8"])
def test_powers_of_two_are_those_of_transformers(packing, dtype):
    tensors, _ = PACKINGS[packing].quantise(matrix(seed=8))
    codes, scale = tensors.values()
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=dtype)
    weight = weight_of(tensors, PACKINGS[packing].settings)
    assert torch.equal(decoded(weight, tensors, dtype), expected)


def test_bytes_of_scales_mean_what_torch_has():
    every = torch.arange(256, dtype=torch.uint8)
    for table, dtype in (
        (e8m0_values(), torch.float8_e8m0fnu),
        (e4m3_values(), torch.float8_e4m3fn),
    ):
        torch.testing.assert_close(table, every.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale_shape", [(4, 2, 3), (4, 48, 1), (4, 1, 1)])
def test_fp8_experts_in_one_tensor(scale_shape):
    codes = torch.randn(4, 48, 72).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape) + 0.5
    tensors = {"weight": codes, "weight_scale_inv": scale}
    weight = weight_of(tensors, {"quant_method": "fp8", "weight_block_size": [24, 24]})
    height, width = 48 // scale_shape[1], 72 // scale_shape[2]
    expected = codes.float() * scale.repeat_interleave(height, 1).repeat_interleave(width, 2)
    assert torch.equal(decoded(weight, tensors, torch.float32), expected)


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
