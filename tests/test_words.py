"""GPTQ, AWQ and INT8 decoders against naive formulas of their formats, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reap_stream import _native
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.errors import CheckpointError
from reap_stream.formats import group_weights, known_formats
from reap_stream.formats.awq import Awq
from reap_stream.formats.gptq import Gptq
from reap_stream.formats.int8 import Int8
from tests.words import pack_awq, pack_gptq

ISAS = _native.available_isas()
TAGS = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int8: "I8",
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def refs_of(parts):
    return {
        name: TensorRef(name, Path("model.safetensors"), TAGS[t.dtype], tuple(t.shape), 0, t.nbytes)
        for name, t in parts.items()
    }


def claimed(tensors, config):
    """The one weight of some tensors, and its parts by role."""
    refs = refs_of(tensors)
    weights = group_weights(refs, known_formats({"quantization_config": config}))
    weight = weights["m.weight"]
    return weight, {role: tensors[ref.name] for role, ref in weight.parts.items()}


def decoded(tensors, config, dtype=torch.float32):
    weight, parts = claimed(tensors, config)
    assert weight.format.refusal(weight) is None
    out = torch.full(weight.shape, 7.0, dtype=dtype)
    weight.format.decode(weight, parts, out)
    return out


def nibble(words, word, place, bits):
    return (int(words[word]) >> (bits * place)) & ((1 << bits) - 1)


def naive_gptq(tensors, bits, offset):
    """Element by element, as the format's definition has it."""
    codes, zeros = tensors["m.qweight"].numpy(), tensors["m.qzeros"].numpy()
    scales, order = tensors["m.scales"].double().numpy(), tensors["m.g_idx"].numpy()
    per_word = 32 // bits
    values = np.empty((codes.shape[1], codes.shape[0] * per_word))
    for n, k in np.ndindex(values.shape):
        code = nibble(codes[:, n], k // per_word, k % per_word, bits)
        ones = offset * sum(1 << at for at in range(0, 32, bits))
        word = (int(zeros[order[k], n // per_word]) + ones) % (1 << 32)
        zero = nibble([word], 0, n % per_word, bits)
        values[n, k] = (code - zero) * scales[order[k], n]
    return values


def naive_awq(tensors):
    codes, zeros = tensors["m.qweight"].numpy(), tensors["m.qzeros"].numpy()
    scales = tensors["m.scales"].double().numpy()
    group = len(codes) // len(scales)
    values = np.empty((codes.shape[1] * 8, codes.shape[0]))
    for n, k in np.ndindex(values.shape):
        place = AWQ_ORDER.index(n % 8)
        code = nibble(codes[k], n // 8, place, 4)
        zero = nibble(zeros[k // group], n // 8, place, 4)
        values[n, k] = (code - zero) * scales[k // group, n]
    return values


def random_words(rng, shape):
    return torch.from_numpy(rng.integers(-(2**31), 2**31, shape, dtype=np.int32))


def random_gptq(rows, columns, group, bits, scattered=False, seed=0, scale_dtype=torch.float16):
    rng = np.random.default_rng(seed)
    groups, per_word = -(-columns // group), 32 // bits
    order = np.arange(columns, dtype=np.int32) // group
    if scattered:
        rng.shuffle(order)
    return {
        "m.qweight": random_words(rng, (columns // per_word, rows)),
        "m.qzeros": random_words(rng, (groups, rows // per_word)),
        "m.scales": torch.from_numpy(rng.random((groups, rows)) - 0.5).to(scale_dtype),
        "m.g_idx": torch.from_numpy(order),
    }


def random_awq(rows, columns, group, seed=0, scale_dtype=torch.float16):
    rng = np.random.default_rng(seed)
    groups = columns // group
    return {
        "m.qweight": random_words(rng, (columns, rows // 8)),
        "m.qzeros": random_words(rng, (groups, rows // 8)),
        "m.scales": torch.from_numpy(rng.random((groups, rows)) - 0.5).to(scale_dtype),
    }


def rounded(values, dtype):
    """One product in float32 is exact in float64, so this is one rounding and then another."""
    return torch.from_numpy(values.astype(np.float32)).to(dtype)


# ---- GPTQ


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("shape", "group"),
    [((32, 64), 32), ((136, 96), 32), ((264, 160), 160), ((8, 40), 20), ((40, 72), 64)],
    ids=str,
)
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize(("stored_as", "offset"), [(None, 1), ("gptq", 1), ("gptq_v2", 0)])
def test_gptq_is_its_definition(bits, shape, group, scattered, stored_as, offset):
    tensors = random_gptq(*shape, group, bits, scattered)
    config = {"quant_method": "gptq", "group_size": group, "bits": bits}
    if stored_as is not None:
        config["checkpoint_format"] = stored_as
    expected = naive_gptq(tensors, bits, offset)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(decoded(tensors, config, dtype), rounded(expected, dtype))


@pytest.mark.parametrize(
    ("packing", "offset"),
    [("auto_round:auto_gptq", 1), ("auto_round", 0), ("auto_round:gptqmodel", 0)],
)
def test_auto_round_keeps_zero_points_as_they_are_save_for_auto_gptq(packing, offset):
    tensors = random_gptq(32, 64, 32, 4)
    config = {"quant_method": "auto-round", "packing_format": packing, "group_size": 32}
    expected = naive_gptq(tensors, 4, offset)
    assert torch.equal(decoded(tensors, config), rounded(expected, torch.float32))


def test_gptq_without_an_order_or_settings():
    tensors = random_gptq(32, 64, 32, 8)
    expected = rounded(naive_gptq(tensors, 8, 1), torch.float32)
    del tensors["m.g_idx"]
    assert torch.equal(decoded(tensors, {}), expected)
    assert torch.equal(decoded(tensors, {"group_size": -1}), expected)


# ---- AWQ


@pytest.mark.parametrize(
    ("shape", "group"),
    [((32, 64), 32), ((136, 96), 32), ((264, 160), 160), ((8, 40), 20), ((16, 8), 8)],
    ids=str,
)
def test_awq_is_its_definition(shape, group):
    tensors = random_awq(*shape, group)
    expected = naive_awq(tensors)
    config = {"quant_method": "awq", "version": "gemm", "group_size": group, "bits": 4}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(decoded(tensors, config, dtype), rounded(expected, dtype))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
        {"quant_method": "moe_wna16"},
        {"quant_method": "awq", "q_group_size": 32, "version": "GEMM"},
    ],
    ids=str,
)
def test_which_of_the_two_it_is_shows_in_the_shapes(config):
    awq, gptq = random_awq(32, 64, 32), random_gptq(32, 64, 32, 4)
    assert isinstance(claimed(awq, config)[0].format, Awq)
    assert isinstance(claimed(gptq, config)[0].format, Gptq)
    assert torch.equal(decoded(awq, config), rounded(naive_awq(awq), torch.float32))


# ---- what the packers of the tests make decodes to what was packed


@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8]), st.booleans(), st.sampled_from([0, 1]))
@settings(max_examples=30, deadline=None)
def test_packed_gptq_comes_back(seed, bits, scattered, offset):
    rng = np.random.default_rng(seed)
    rows, columns, group = 32, 96, 32
    order = torch.arange(columns, dtype=torch.int32) // group
    if scattered:
        order = order[torch.from_numpy(rng.permutation(columns))]
    codes = torch.from_numpy(rng.integers(0, 1 << bits, (rows, columns)))
    zeros = torch.from_numpy(rng.integers(0, 1 << bits, (rows, columns // group)))
    scale = torch.from_numpy(rng.random((rows, columns // group)).astype(np.float32))
    stored = pack_gptq(codes, zeros, scale, order, bits, offset)
    config = {"checkpoint_format": "gptq" if offset else "gptq_v2"}
    expected = (codes - zeros[:, order.long()]).float() * scale[:, order.long()]
    tensors = {f"m.{name}": tensor for name, tensor in stored.items()}
    assert torch.equal(decoded(tensors, config), expected)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_packed_awq_comes_back(seed):
    rng = np.random.default_rng(seed)
    rows, columns, group = 24, 64, 32
    codes = torch.from_numpy(rng.integers(0, 16, (rows, columns)))
    zeros = torch.from_numpy(rng.integers(0, 16, (rows, columns // group)))
    scale = torch.from_numpy(rng.random((rows, columns // group)).astype(np.float32))
    tensors = {f"m.{n}": tensor for n, tensor in pack_awq(codes, zeros, scale).items()}
    spread = torch.arange(columns) // group
    expected = (codes - zeros[:, spread]).float() * scale[:, spread]
    assert torch.equal(decoded(tensors, {"quant_method": "awq"}), expected)


# ---- INT8


@pytest.mark.parametrize(
    ("scale_shape", "suffix", "span"),
    [
        ((33, 1), "_scale", (1, 40)),
        ((33,), "_scale", (1, 40)),
        ((), "_scale", (33, 40)),
        ((1,), "_scale", (33, 40)),
        ((33, 5), "_scale", (1, 8)),
        ((3, 3), "_scale_inv", (16, 16)),
        ((3, 3), "_scale", (16, 16)),
    ],
)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_code_times_scale(scale_shape, suffix, span, scale_dtype):
    rng = np.random.default_rng(3)
    codes = torch.from_numpy(rng.integers(-128, 128, (33, 40), dtype=np.int8))
    scale = torch.from_numpy(rng.random(scale_shape, dtype=np.float32)).to(scale_dtype)
    config = {"weight_block_size": [16, 16]}
    grid = scale.double().numpy().reshape(-(-33 // span[0]), -1)
    expected = np.empty((33, 40))
    for n, k in np.ndindex(expected.shape):
        expected[n, k] = int(codes[n, k]) * grid[n // span[0], k // span[1]]
    tensors = {"m.weight": codes, f"m.weight{suffix}": scale}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(decoded(tensors, config, dtype), rounded(expected, dtype))


@pytest.mark.parametrize("groups", [1, 5])
def test_int8_zero_points_are_subtracted(groups):
    rng = np.random.default_rng(4)
    codes = torch.from_numpy(rng.integers(-128, 128, (24, 40), dtype=np.int8))
    zero = torch.from_numpy(rng.integers(-128, 128, (24, groups), dtype=np.int8))
    scale = torch.from_numpy(rng.random((24, groups), dtype=np.float32))
    tensors = {"m.weight": codes, "m.weight_scale": scale, "m.weight_zero_point": zero}
    spread = torch.arange(40) // (40 // groups)
    expected = (codes.float() - zero.float()[:, spread]) * scale[:, spread]
    assert torch.equal(decoded(tensors, {}), expected)


def test_int8_experts_in_one_tensor():
    rng = np.random.default_rng(5)
    codes = torch.from_numpy(rng.integers(-128, 128, (3, 8, 16), dtype=np.int8))
    scale = torch.from_numpy(rng.random((3, 8, 1), dtype=np.float32))
    assert torch.equal(
        decoded({"m.weight": codes, "m.weight_scale": scale}, {}), codes.float() * scale
    )


def test_int8_is_what_compressed_tensors_makes_of_it():
    library = pytest.importorskip("compressed_tensors.quantization")
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(6))
    arguments = library.QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    zero = torch.zeros_like(scale, dtype=torch.int8)
    codes = lifecycle.quantize(weight, scale, zero, arguments, dtype=torch.int8)
    meant = lifecycle.dequantize(codes, scale, zero, args=arguments, dtype=torch.float32)
    assert torch.equal(decoded({"m.weight": codes, "m.weight_scale": scale}, {}), meant)


def test_other_int8_tensors_are_no_weights_of_this_format():
    tensors = {"m.codes": torch.zeros(4, 4, dtype=torch.int8), "m.weight": torch.zeros(4, 4)}
    weights = group_weights(refs_of(tensors), known_formats({}))
    assert all(not isinstance(weight.format, Int8) for weight in weights.values())


# ---- one value, wherever and however it is computed


@pytest.mark.parametrize("kind", ["gptq", "gptq8", "scattered", "awq", "int8"])
def test_every_way_of_decoding_gives_the_same(kind):
    tensors = {
        "gptq": random_gptq(264, 160, 32, 4),
        "gptq8": random_gptq(264, 160, 32, 8),
        "scattered": random_gptq(264, 160, 32, 4, scattered=True),
        "awq": random_awq(264, 160, 32),
        "int8": {
            "m.weight": torch.arange(-128, 128).repeat(165).view(264, 160).to(torch.int8),
            "m.weight_scale": torch.rand(264, 1),
        },
    }[kind]
    weight, parts = claimed(tensors, {"group_size": 32})
    whole = torch.zeros(264, 200)
    weight.format.decode(weight, parts, whole[:, 8:168])
    alone = torch.empty(264, 160)
    weight.format.decode(weight, parts, alone)
    assert torch.equal(whole[:, 8:168], alone)
    assert not whole[:, :8].any()
    assert not whole[:, 168:].any()


def native(tensors, layout, bits, dtype, **options):
    rows, columns = tensors["m.scales"].shape[1], tensors["m.qweight"].shape[0]
    columns *= 32 // bits if layout == "gptq" else 1
    out = np.full((rows, columns), 0x55, np.int16 if dtype == "bf16" else np.int32)
    scale, order = tensors["m.scales"], tensors.get("m.g_idx")
    _native.rearranged_decode(
        tensors["m.qweight"].numpy(),
        layout,
        bits,
        scale.view(torch.int16).numpy(),
        "f16",
        tensors["m.qzeros"].numpy(),
        1,
        None if order is None else order.numpy(),
        out,
        rows,
        columns,
        columns // len(scale),
        dtype,
        **options,
    )
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("shape", [(8, 8), (136, 160), (520, 48), (1032, 224)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_instruction_sets_and_threads_do_not_show(isa, dtype, shape, threads):
    rows, columns = shape
    group = 16 if columns % 16 == 0 else columns
    cases = [
        (random_gptq(rows, columns, group, 4), "gptq", 4),
        (random_gptq(rows, columns, group, 8), "gptq", 8),
        (random_gptq(rows, columns, group, 4, scattered=True), "gptq", 4),
        (random_awq(rows, columns, group), "awq", 4),
    ]
    for tensors, layout, bits in cases:
        plain = native(tensors, layout, bits, dtype, isa="scalar", threads=1)
        fast = native(tensors, layout, bits, dtype, isa=isa, threads=threads)
        np.testing.assert_array_equal(fast, plain)


def test_buffers_may_start_anywhere():
    tensors = random_awq(136, 160, 32)
    plain = native(tensors, "awq", 4, "bf16")
    raw = tensors["m.qweight"].numpy().tobytes()
    out = np.zeros_like(plain)
    moved = memoryview(b"\xa5" + raw)[1:]
    scale = memoryview(b"\xa5" + tensors["m.scales"].numpy().tobytes())[1:]
    zero = memoryview(b"\xa5" + tensors["m.qzeros"].numpy().tobytes())[1:]
    _native.rearranged_decode(
        moved, "awq", 4, scale, "f16", zero, 1, None, out, 136, 160, 32, "bf16"
    )
    np.testing.assert_array_equal(out, plain)


ARGUMENTS = {
    "codes": bytes(32),
    "layout": "gptq",
    "bits": 4,
    "scale": bytes(32),
    "scale_dtype": "f32",
    "zero": bytes(4),
    "zero_offset": 1,
    "group_of": None,
    "out": bytearray(256),
    "rows": 8,
    "cols": 8,
    "group": 8,
    "out_dtype": "f32",
}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layout": "gemv"}, "layout is 'gemv'"),
        ({"bits": 3}, "bits is 3"),
        ({"layout": "awq", "bits": 8}, "bits is 8"),
        ({"layout": "int8"}, "bits is 4"),
        ({"codes": bytes(31)}, "codes has 31 bytes where the shape needs 32"),
        ({"scale": bytes(33)}, "scale has 33 bytes where the shape needs 32"),
        ({"zero": bytes(5)}, "zero has 5 bytes where the shape needs 4"),
        ({"out": bytearray(255)}, "out has 255 bytes where the shape needs 256"),
        ({"out": bytes(256)}, "out must be C-contiguous and writable"),
        ({"rows": 12}, "rows is 12, no multiple of the 8"),
        ({"cols": 4}, "cols is 4, no multiple of the 8"),
        ({"group": 3}, "group is 3; groups of 4-bit codes"),
        ({"group": 0}, "group is 0"),
        ({"rows": 2**62, "cols": 8}, "more than 2"),
        ({"zero_offset": 2}, "zero_offset is 2"),
        ({"group_of": np.array([0] * 7 + [1], np.int32)}, r"group_of\[7\] is 1; there are 1"),
        ({"group_of": np.array([-1] * 8, np.int32)}, r"group_of\[0\] is -1"),
        ({"group_of": np.zeros(7, np.int32)}, "group_of"),
        ({"group_of": np.zeros(8, np.int64)}, "group_of"),
        ({"scale_dtype": "u8"}, "scale_dtype is 'u8'"),
        ({"out_dtype": "f16"}, "out_dtype is 'f16'"),
    ],
)
def test_arguments_are_checked(changes, match):
    with pytest.raises(ValueError, match=match):
        _native.rearranged_decode(**{**ARGUMENTS, **changes})


def test_overlapping_buffers_are_refused():
    shared = bytearray(256)
    with pytest.raises(ValueError, match="overlap"):
        _native.rearranged_decode(**{**ARGUMENTS, "out": shared, "codes": memoryview(shared)[:32]})


# ---- what is refused


GPTQ = random_gptq(32, 64, 32, 4)
AWQ = random_awq(32, 64, 32)
INT8 = {"m.weight": torch.zeros(8, 8, dtype=torch.int8), "m.weight_scale": torch.ones(8, 1)}


@pytest.mark.parametrize(
    ("tensors", "changes", "config", "match"),
    [
        (GPTQ, {"m.qzeros": None}, {}, r"has no m\.qzeros"),
        (GPTQ, {"m.scales": None}, {}, r"has no m\.scales"),
        (GPTQ, {}, {"checkpoint_format": "marlin"}, "'marlin' is not one of gptq, gptq_v2"),
        (GPTQ, {"m.qzeros": torch.zeros(2, 2, dtype=torch.int32)}, {}, "of 2"),
        (GPTQ, {"m.qzeros": torch.zeros(2, 3, dtype=torch.int32)}, {}, "of 3"),
        (GPTQ, {"m.qzeros": torch.zeros(3, 4, dtype=torch.int32)}, {}, r"m\.qzeros' is I32 \[3"),
        (
            GPTQ,
            {"m.qweight": torch.zeros(8, 32)},
            {},
            "F32",
        ),
        (GPTQ, {"m.g_idx": torch.zeros(63, dtype=torch.int32)}, {}, r"m\.g_idx' is I32 \[63\]"),
        (GPTQ, {"m.scales": torch.ones(2, 32, dtype=torch.int32)}, {}, r"m\.scales' is I32"),
        (GPTQ, {"m.scales": torch.ones(())}, {}, "4 or 8 bits"),
        (AWQ, {}, {"quant_method": "awq", "version": "gemv"}, "version 'gemv'"),
        (AWQ, {}, {"quant_method": "awq", "version": "GEMV_FAST"}, "version 'gemv_fast'"),
        (AWQ, {"m.qzeros": None}, {}, r"has no m\.qzeros"),
        (AWQ, {"m.qzeros": torch.zeros(2, 8, dtype=torch.int32)}, {}, "codes of 8 bits, not 4"),
        (
            AWQ,
            {"m.qzeros": torch.zeros(1, 4, dtype=torch.int32)},
            {},
            r"m\.qzeros' is I32 \[1, 4\]",
        ),
        (INT8, {"m.weight_scale": None}, {}, "has no scale"),
        (INT8, {"m.weight_scale": torch.ones(7, 1)}, {}, r"\[7, 1\], which is neither"),
        (INT8, {"m.weight_scale": torch.ones(8, 3)}, {}, r"\[8, 3\], which is neither"),
        (INT8, {"m.weight_scale": torch.ones(8, 1, dtype=torch.int32)}, {}, "dtype I32"),
        (
            INT8,
            {"m.weight_zero_point": torch.zeros(7, 1, dtype=torch.int8)},
            {},
            r"expected I8 \[8",
        ),
        (
            {
                "m.weight": torch.zeros(2, 8, 8, dtype=torch.int8),
                "m.weight_scale": torch.ones(3, 8, 1),
            },
            {},
            {},
            "2 experts in front",
        ),
    ],
)
def test_what_cannot_be_decoded_is_refused(tensors, changes, config, match):
    changed = {name: t for name, t in {**tensors, **changes}.items() if t is not None}
    weight, _ = claimed(changed, config)
    reason = weight.format.refusal(weight)
    assert reason is not None
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(reason)


def test_groups_that_do_not_exist_are_found_when_they_are_read():
    tensors = {**GPTQ, "m.g_idx": torch.full((64,), 2, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match=r"m\.g_idx' names groups 2 to 2.*has 2"):
        decoded(tensors, {})


@pytest.mark.parametrize("size", ["128", 1.5, [128, 128], True, None, 0, -1, 7])
def test_a_group_size_that_says_nothing_is_told_by_the_shapes(size):
    config = {"quant_method": "gptq", "group_size": size}
    assert torch.equal(decoded(GPTQ, config), decoded(GPTQ, {"group_size": 32}))


@pytest.mark.parametrize(
    "config",
    [
        {"checkpoint_format": 7, "packing_format": [], "version": {}, "format": None},
        {"quant_method": None, "bits": "four", "desc_act": 3},
    ],
    ids=str,
)
def test_malformed_settings_are_no_tracebacks(config):
    for tensors in (GPTQ, AWQ):
        weight, _ = claimed(tensors, config)
        weight.format.refusal(weight)
