"""Packed formats against what their quantisers and other libraries mean by them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from reap_stream.formats import group_weights, known_formats, member
from reap_stream.formats.scales import e4m3_values, e8m0_values
from tests.packed_weights import FLOATS, decoded, fused_mxfp4, matrix, refs_of, weight_of
from tests.quantisers import PACKINGS, compressed, pack_words, packed_int


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
