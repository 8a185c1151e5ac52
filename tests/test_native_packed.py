"""The decoder of packed codes on every instruction set, bit for bit against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reap_stream import _native

ISAS = _native.available_isas()
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
NUMBERS = {
    "e2m1": torch.tensor([*E2M1, *(-value for value in E2M1)]),
    "u4": torch.arange(16.0),
    "u8": torch.arange(256.0),
}
MIDDLE = {"e2m1": 0.0, "u4": 8.0, "u8": 128.0}
FLOATS = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
INTEGERS = {"bf16": torch.int16, "f16": torch.int16, "f32": torch.int32}
# (rows, cols, group): groups around the vectors' widths, the last one cut short, one for a row,
# odd rows, nothing at all
SHAPES = [
    (1, 1, 1),
    (3, 7, 7),
    (4, 64, 16),
    (5, 96, 32),
    (2, 1030, 128),
    (7, 129, 40),
    (3, 70, 2),
    (2, 4099, 4099),
    (300, 1024, 32),
    (0, 8, 4),
    (5, 0, 2),
]
BOTH = pytest.mark.parametrize("dtype", ["bf16", "f32"])
CODES = pytest.mark.parametrize("code", list(NUMBERS))


def num_groups(shape):
    return -(-shape[1] // shape[2])


def pack(codes, code, padding=0):
    """Codes [rows, cols] as rows of bytes, the low half of a byte first."""
    rows = codes
    if code != "u8":
        rows = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
        rows = rows[:, ::2] | (rows[:, 1::2] << 4)
    return np.ascontiguousarray(np.pad(rows.astype(np.uint8), ((0, 0), (0, padding))))


def expected_bits(codes, code, scale, zero, shape, dtype):
    """`(number - zero) * scale` in float32, rounded by torch."""
    spread = np.arange(shape[1]) // shape[2]
    scale = scale.float()[:, spread]
    zero = MIDDLE[code] if zero is None else torch.from_numpy(zero).float()[:, spread]
    values = (NUMBERS[code][torch.from_numpy(codes.astype(np.int64))] - zero) * scale
    return values.to(FLOATS[dtype]).contiguous().view(INTEGERS[dtype]).numpy()


def decode(packed, code, scale, zero, shape, dtype, *, table=None, **options):
    out = np.full(shape[:2], 0x55, np.int16 if dtype == "bf16" else np.int32)
    tag = "u8" if table is not None else next(k for k, v in FLOATS.items() if v == scale.dtype)
    raw = scale if table is not None else scale.contiguous().view(INTEGERS[tag]).numpy()
    rows, cols, group = shape
    _native.packed_decode(
        packed, code, raw, tag, table, zero, out, rows, cols, group, packed.shape[1], dtype,
        **options,
    )  # fmt: skip
    return out


def random_codes(rng, code, shape):
    return rng.integers(0, len(NUMBERS[code]), shape[:2]).astype(np.uint8)


@pytest.mark.parametrize("isa", ISAS)
@BOTH
@CODES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale_dtype", list(FLOATS))
def test_decode_is_torch_bit_for_bit(shape, code, dtype, scale_dtype, isa):
    rng = np.random.default_rng(1)
    codes = random_codes(rng, code, shape)
    grid = (shape[0], num_groups(shape))
    scale = torch.from_numpy(rng.standard_normal(grid)).to(FLOATS[scale_dtype])
    packed = pack(codes, code, padding=int(shape[0]) % 4)
    zeros = [None]
    if code != "e2m1":
        zeros.append(rng.integers(0, len(NUMBERS[code]), grid).astype(np.uint8))
    for zero in zeros:
        expected = expected_bits(codes, code, scale, zero, shape, dtype)
        got = decode(packed, code, scale, zero, shape, dtype, isa=isa)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("isa", ISAS)
@BOTH
@CODES
@pytest.mark.parametrize(
    "factor", [0.0, -0.0, 1e-45, 1e-38, 3.4e38, np.inf, -np.inf, np.nan, 2.0**-127, 0.37]
)
def test_every_code_under_unusual_scales(factor, code, dtype, isa):
    shape = (4, 256, 64)
    codes = np.tile(np.arange(256) % len(NUMBERS[code]), (4, 1)).astype(np.uint8)
    scale = torch.full((4, 4), factor)
    expected = expected_bits(codes, code, scale, None, shape, dtype)
    got = decode(pack(codes, code), code, scale, None, shape, dtype, isa=isa)
    if dtype == "bf16":
        np.testing.assert_array_equal(got, expected)
    else:  # which NaN a float32 product is, IEEE 754 leaves open
        np.testing.assert_array_equal(got.view(np.float32), expected.view(np.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_bytes_mean_what_the_table_says(isa):
    rng = np.random.default_rng(2)
    shape = (16, 512, 32)
    codes = random_codes(rng, "e2m1", shape)
    scale = np.arange(256, dtype=np.uint8).reshape(16, 16)
    table = rng.standard_normal(256).astype(np.float32)
    meant = torch.from_numpy(table[scale])
    expected = expected_bits(codes, "e2m1", meant, None, shape, "bf16")
    packed = pack(codes, "e2m1")
    got = decode(packed, "e2m1", scale, None, shape, "bf16", table=table, isa=isa)
    np.testing.assert_array_equal(got, expected)


def test_four_bit_codes_lie_in_32_bit_words_as_in_bytes():
    codes = np.arange(16, dtype=np.uint8).reshape(1, 16)
    words = np.array(
        [[sum(int(c) << 4 * i for i, c in enumerate(half)) for half in codes.reshape(2, 8)]]
    )
    scale = torch.ones(1, 1)
    got = decode(words.astype("<u4").view(np.uint8), "u4", scale, None, (1, 16, 16), "f32")
    np.testing.assert_array_equal(got.view(np.float32)[0], np.arange(16) - 8)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    cols=st.integers(1, 150),
    half_group=st.integers(1, 80),
    code=st.sampled_from(list(NUMBERS)),
    padding=st.integers(0, 3),
    offset=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_layout_at_any_address(rows, cols, half_group, code, padding, offset, seed):
    rng = np.random.default_rng(seed)
    shape = (rows, cols, 2 * half_group)
    codes = random_codes(rng, code, shape)
    scale = torch.from_numpy(rng.standard_normal((rows, num_groups(shape)))).float()
    expected = expected_bits(codes, code, scale, None, shape, "bf16")
    packed = pack(codes, code, padding)
    source = memoryview(bytearray(b"\xee" * offset + packed.tobytes()))[offset:]
    for isa in ISAS:
        for threads in (1, 2):
            raw = bytearray(b"\xa5" * (offset + 2 * rows * cols + 3))
            out = memoryview(raw)[offset : offset + 2 * rows * cols]
            _native.packed_decode(
                source, code, scale.numpy(), "f32", None, None, out, *shape, packed.shape[1],
                "bf16", threads=threads, isa=isa,
            )  # fmt: skip
            assert bytes(out) == expected.tobytes()
            assert raw[:offset] == b"\xa5" * offset
            assert raw[-3:] == b"\xa5" * 3


GOOD = {
    "codes": np.zeros((4, 8), np.uint8),
    "code_type": "u4",
    "scale": np.ones((4, 2), np.float32),
    "scale_dtype": "f32",
    "scale_table": None,
    "zero": None,
    "out": np.zeros((4, 16), np.float32),
    "rows": 4,
    "cols": 16,
    "group": 8,
    "row_nbytes": 8,
    "out_dtype": "f32",
}
WRONG = [
    ({"codes": np.zeros((4, 7), np.uint8)}, "codes has 28 bytes where the shape needs 32"),
    ({"scale": np.ones((4, 1), np.float32)}, "scale has 16 bytes where the shape needs 32"),
    ({"out": np.zeros((4, 15), np.float32)}, "out has 240 bytes where the shape needs 256"),
    ({"zero": np.zeros(7, np.uint8)}, "zero has 7 bytes where the shape needs 8"),
    ({"row_nbytes": 7, "codes": np.zeros((4, 7), np.uint8)}, "row_nbytes is 7 where.* needs 8"),
    ({"code_type": "u8"}, "row_nbytes is 8 where a row of 16 codes needs 16"),
    ({"code_type": "u3"}, "code_type is 'u3'"),
    ({"scale_dtype": "f64"}, "scale_dtype is 'f64'"),
    ({"scale_dtype": "u8", "scale": np.ones((4, 2), np.uint8)}, "scale_table goes with"),
    ({"scale_table": np.ones(256, np.float32)}, "scale_table goes with scale_dtype 'u8'"),
    (
        {
            "scale_dtype": "u8",
            "scale": np.ones((4, 2), np.uint8),
            "scale_table": np.ones(255, np.float32),
        },
        "scale_table has 255 items",
    ),
    ({"group": 0}, "group is 0"),
    ({"group": 5, "scale": np.ones((4, 4), np.float32)}, "group is 5; groups of 4-bit codes"),
    ({"code_type": "e2m1", "zero": np.zeros((4, 2), np.uint8)}, "not with e2m1"),
    ({"out_dtype": "f16"}, "out_dtype is 'f16'"),
    ({"rows": 2**62}, "more than 2\\^63"),
    ({"rows": -1}, "rows is -1"),
]


@pytest.mark.parametrize(("changes", "match"), WRONG, ids=[match for _, match in WRONG])
def test_arguments_that_do_not_fit_are_refused(changes, match):
    _native.packed_decode(*GOOD.values())
    with pytest.raises(ValueError, match=match):
        _native.packed_decode(*{**GOOD, **changes}.values())


def test_output_over_input_is_refused():
    shared = np.zeros((4, 16), np.float32)
    changed = {**GOOD, "out": shared, "scale": shared.reshape(-1)[:8]}
    with pytest.raises(ValueError, match="overlap"):
        _native.packed_decode(*changed.values())
