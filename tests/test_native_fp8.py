"""FP8 kernels on every instruction set, bit for bit against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reap_stream import _native

ISAS = _native.available_isas()
TORCH_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
INT_DTYPES = {"bf16": torch.int16, "f32": torch.int32}
# (rows, cols, block rows, block cols): whole blocks, odd edges, widths around the vectors', channels,
# tensors, blocks larger than the matrix, nothing at all
SHAPES = [
    (1, 1, 1, 1),
    (7, 13, 3, 5),
    (256, 384, 128, 128),
    (300, 200, 128, 128),
    (33, 517, 1, 517),
    (5, 4099, 1, 4099),
    (64, 1000, 64, 1000),
    (3, 31, 128, 128),
    (40, 33, 16, 32),
    (9, 2000, 4, 33),
    (0, 5, 1, 5),
    (5, 0, 1, 1),
]
seeds = st.integers(0, 2**32 - 1)


def grid_of(shape):
    rows, cols, block_rows, block_cols = shape
    return -(-rows // block_rows), -(-cols // block_cols)


def expand(scale, shape):
    """The scale of every element, as torch would be given it."""
    rows, cols, block_rows, block_cols = shape
    wide = np.repeat(
        np.repeat(scale, min(block_rows, max(rows, 1)), 0), min(block_cols, max(cols, 1)), 1
    )
    return torch.from_numpy(wide[:rows, :cols].copy())


def bits(tensor, dtype):
    return tensor.contiguous().view(INT_DTYPES[dtype]).numpy()


def decode(codes, scale, shape, dtype, **options):
    out = np.full(shape[:2], 0x55, np.int16 if dtype == "bf16" else np.int32)
    _native.fp8_decode(codes, scale, out, *shape, dtype, **options)
    return out


def decode_by_torch(codes, scale, shape, dtype):
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float32)
    return bits((values * expand(scale, shape)).to(TORCH_DTYPES[dtype]), dtype)


def encode(values, scale, shape, dtype, **options):
    out = np.full(shape[:2], 0x55, np.uint8)
    _native.fp8_encode(bits(values, dtype), dtype, scale, out, *shape, **options)
    return out


def encode_by_torch(values, scale, shape):
    quotients = values.float() / expand(scale, shape)
    return quotients.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def random_scales(rng, shape, low=-3.0, high=3.0):
    return (10 ** rng.uniform(low, high, grid_of(shape))).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_is_torch_bit_for_bit(shape, dtype, isa):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, shape[:2], dtype=np.uint8)
    for low, high in ((-3, 3), (-44, -36), (36, 38.5)):  # subnormal and overflowing products too
        scale = random_scales(rng, shape, low, high)
        expected = decode_by_torch(codes, scale, shape, dtype)
        np.testing.assert_array_equal(decode(codes, scale, shape, dtype, isa=isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize(
    "factor", [1.0, -1.0, 0.0, -0.0, 1e-45, 3.4e38, np.inf, -np.inf, np.nan, 2.0**120, 0.37]
)
def test_decode_of_every_code_under_unusual_scales(factor, dtype, isa):
    shape = (16, 1024, 1, 1024)  # enough under each scale for the table path
    codes = np.tile(np.arange(256, dtype=np.uint8), 64).reshape(shape[:2])
    scale = np.full(grid_of(shape), factor, np.float32)
    expected = decode_by_torch(codes, scale, shape, dtype)
    got = decode(codes, scale, shape, dtype, isa=isa)
    if dtype == "bf16":
        np.testing.assert_array_equal(got, expected)
    else:  # which NaN a float32 product is, IEEE 754 leaves open
        np.testing.assert_array_equal(got.view(np.float32), expected.view(np.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_decode_without_scale_is_a_cast(isa):
    shape = (4, 256, 1, 256)
    codes = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    ones = np.ones(grid_of(shape), np.float32)
    for dtype in ("bf16", "f32"):
        expected = decode_by_torch(codes, ones, shape, dtype)
        np.testing.assert_array_equal(decode(codes, None, shape, dtype, isa=isa), expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 150),
    block_rows=st.integers(1, 50),
    block_cols=st.integers(1, 160),
    offset=st.integers(0, 3),
    seed=seeds,
)
def test_decode_of_any_layout_at_any_address(rows, cols, block_rows, block_cols, offset, seed):
    rng = np.random.default_rng(seed)
    shape = (rows, cols, block_rows, block_cols)
    codes = rng.integers(0, 256, (rows, cols), dtype=np.uint8)
    scale = random_scales(rng, shape)
    expected = decode_by_torch(codes, scale, shape, "bf16")
    for isa in ISAS:
        raw = bytearray(b"\xa5" * (offset + 2 * rows * cols + 3))
        out = memoryview(raw)[offset : offset + 2 * rows * cols]
        _native.fp8_decode(codes, scale, out, *shape, "bf16", isa=isa)
        assert bytes(out) == expected.tobytes()
        assert raw[:offset] == b"\xa5" * offset
        assert raw[-3:] == b"\xa5" * 3


@pytest.mark.parametrize("isa", ISAS)
def test_encode_of_every_bf16_value(isa):
    shape = (256, 256, 128, 128)
    values = (
        torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    )
    for factor in (1.0, 0.37, 1e-40, 1e38):
        scale = np.full(grid_of(shape), factor, np.float32)
        got = encode(values, scale, shape, "bf16", isa=isa)
        np.testing.assert_array_equal(got, encode_by_torch(values, scale, shape))


@pytest.mark.parametrize("isa", ISAS)
def test_encode_rounds_halfway_cases_to_even_and_saturates(isa):
    finite = np.arange(0x7F, dtype=np.uint8)
    exact = torch.from_numpy(finite).view(torch.float8_e4m3fn).float().numpy()
    halfway = (exact[:-1] + exact[1:]) / 2
    around = np.concatenate(
        [
            exact,
            halfway,
            np.nextafter(halfway, np.float32(-np.inf)),
            np.nextafter(halfway, np.float32(np.inf)),
            np.float32([447, 448, 449, 463.9, 464, 464.1, 480, 1e30, np.inf, np.nan, 1e-45]),
        ]
    ).astype(np.float32)
    values = torch.from_numpy(np.concatenate([around, -around]).reshape(1, -1))
    shape = (1, values.shape[1], 1, values.shape[1])
    ones = np.ones((1, 1), np.float32)
    got = encode(values, ones, shape, "f32", isa=isa)
    np.testing.assert_array_equal(got, encode_by_torch(values, ones, shape))
    np.testing.assert_array_equal(got[0, : len(finite)], finite)
    np.testing.assert_array_equal(encode(values, None, shape, "f32", isa=isa), got)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encode_is_torch_bit_for_bit(shape, dtype, isa):
    rng = np.random.default_rng(2)
    spread = 10.0 ** rng.uniform(-6, 6, shape[:2])
    values = torch.from_numpy(rng.standard_normal(shape[:2]) * spread).to(TORCH_DTYPES[dtype])
    scale = random_scales(rng, shape)
    got = encode(values, scale, shape, dtype, isa=isa)
    np.testing.assert_array_equal(got, encode_by_torch(values, scale, shape))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
def test_encode_refuses_a_scale_it_cannot_divide_by(bad):
    scale = np.float32([[1.0, bad]])
    with pytest.raises(ValueError, match=r"scale\[1\] is .* finite and above zero"):
        _native.fp8_encode(np.zeros((2, 4), np.float32), "f32", scale, bytearray(8), 2, 4, 2, 2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_absmax_is_the_naive_one(shape, dtype, isa):
    rows, cols, block_rows, block_cols = shape
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(3)) * 100
    values = values.to(TORCH_DTYPES[dtype])
    out = np.full(grid_of(shape), 7, np.float32)
    _native.block_absmax(bits(values, dtype), dtype, out, *shape, isa=isa)
    for i, j in np.ndindex(out.shape):
        block = values[i * block_rows : (i + 1) * block_rows, j * block_cols : (j + 1) * block_cols]
        assert out[i, j] == block.abs().max().item()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_block_absmax_keeps_nan_and_infinity(dtype, isa):
    values = torch.zeros(4, 70)
    values[0, 69] = -float("inf")
    values[3, 0] = float("nan")
    values[3, 1] = float("inf")
    out = np.zeros((2, 1), np.float32)
    raw = bits(values.to(TORCH_DTYPES[dtype]), dtype)
    _native.block_absmax(raw, dtype, out, 4, 70, 2, 70, isa=isa)
    assert out[0, 0] == np.inf
    assert np.isnan(out[1, 0])


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_threads_do_not_show(threads):
    rng = np.random.default_rng(4)
    for shape in ((700, 1100, 128, 128), (700, 1100, 700, 1100), (2000, 300, 1, 300)):
        codes = rng.integers(0, 256, shape[:2], dtype=np.uint8)
        scale = random_scales(rng, shape)
        values = rng.standard_normal(shape[:2]).astype(np.float32)
        expected = decode_by_torch(codes, scale, shape, "bf16")
        largest = np.empty(grid_of(shape), np.float32)
        alone = np.empty_like(largest)
        _native.block_absmax(values, "f32", largest, *shape, threads=threads)
        _native.block_absmax(values, "f32", alone, *shape, threads=1)
        tensor = torch.from_numpy(values)
        got = decode(codes, scale, shape, "bf16", threads=threads)
        np.testing.assert_array_equal(got, expected)
        encoded = encode(tensor, scale, shape, "f32", threads=threads)
        np.testing.assert_array_equal(encoded, encode_by_torch(tensor, scale, shape))
        np.testing.assert_array_equal(largest, alone)


@pytest.mark.parametrize("isa", ISAS)
def test_flush_to_zero_mode_of_the_caller_does_not_show(isa):
    shape = (8, 256, 1, 256)
    codes = np.tile(np.arange(256, dtype=np.uint8), (8, 1))
    scale = np.full(grid_of(shape), 1e-40, np.float32)
    expected = decode_by_torch(codes, scale, shape, "f32")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        got = decode(codes, scale, shape, "f32", isa=isa)
        flushed = float(np.float32(1e-40) * np.float32(2)) == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert flushed, "the mode was not on, so that this test shows nothing"
    np.testing.assert_array_equal(got.view(np.float32), expected.view(np.float32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_encode_and_absmax_read_from_any_address(dtype, isa):
    shape = (6, 45, 4, 40)
    values = torch.randn(6, 45, generator=torch.Generator().manual_seed(6)).to(TORCH_DTYPES[dtype])
    content = bits(values, dtype).tobytes()
    moved = memoryview(b"\xa5" + content)[1:]
    results = []
    for data in (content, moved):
        codes, largest = bytearray(6 * 45), np.empty(grid_of(shape), np.float32)
        _native.fp8_encode(data, dtype, None, codes, *shape, isa=isa)
        _native.block_absmax(data, dtype, largest, *shape, isa=isa)
        results.append((bytes(codes), largest.tobytes()))
    assert results[0] == results[1]
