"""Encoders against the quantisers whose checkpoints engines read, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reap_stream.errors import OutputError
from reap_stream.recoding.bfloat16 import BFloat16
from reap_stream.recoding.fp8_block import Fp8Block
from reap_stream.recoding.fp8_channel import Fp8Channel
from tests.fp8_formula import formula

BLOCK, CHANNEL = Fp8Block(), Fp8Channel()
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
SHAPES = [(128, 128), (256, 384), (130, 200), (1, 1), (127, 129), (3, 640)]


def matrix(shape, dtype, seed=0, spread=4.0):
    """Values of very different sizes, with a block and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values *= torch.exp(spread * torch.randn(shape, generator=generator)).clamp(max=1e3)
    values[: min(shape[0], 128), : min(shape[1], 128)] *= 0 if shape[1] > 128 else 1
    values[-1] = 0 if shape[0] > 1 else values[-1]
    return values.to(dtype)


def encode(encoder, values):
    """Codes and scales, in the shapes the encoder says."""
    codes, scale = encoder.parts(tuple(values.shape))
    raw = encoder.encode(values, "here: tensor 'w'")
    return (
        torch.from_numpy(raw[0]).view(torch.float8_e4m3fn).view(codes.shape),
        torch.from_numpy(raw[1]).view(torch.float32).view(scale.shape),
    )


def assert_bits(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        assert torch.equal(
            mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_those_of_the_formula(shape, dtype):
    values = matrix(shape, dtype)
    assert_bits(encode(BLOCK, values), formula(values, (128, 128), 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channels_are_those_of_the_formula(shape, dtype):
    values = matrix(shape, dtype)
    assert_bits(encode(CHANNEL, values), formula(values, (1, shape[1]), 2.0**-23))


@settings(max_examples=40)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-140, 120),
)
@example(rows=1, columns=1, seed=999999, exponent=-138)
def test_of_any_size(rows, columns, seed, exponent):
    values = matrix((rows, columns), torch.float32, seed, 1.0) * 2.0**exponent
    assert_bits(encode(BLOCK, values), formula(values, (128, 128), 1.0))


def test_rows_apart_are_rows_together():
    values = matrix((300, 200), torch.bfloat16)
    whole = [memoryview(data) for data in BLOCK.encode(values, "")]
    parts = BLOCK.parts((300, 200))
    for row in range(0, 300, BLOCK.rows):
        found = BLOCK.encode(values[row : row + BLOCK.rows], "")
        for data, part, expected in zip(found, parts, whole, strict=True):
            at = part.offset(row)
            assert bytes(data) == bytes(expected[at : at + len(data)])


@pytest.mark.parametrize("encoder", [BLOCK, CHANNEL], ids=lambda e: e.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(encoder, bad):
    values = matrix((130, 130), torch.float32)
    values[129, 3] = bad
    with pytest.raises(OutputError, match=r"here: tensor 'w' holds values that are infinite"):
        encoder.encode(values, "here: tensor 'w'")


@pytest.mark.parametrize("strategy", ["channel", "block"])
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (7, 640)], ids=str)
def test_compressed_tensors_gives_the_same(strategy, shape):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    if strategy == "block" and shape[0] % 128:
        pytest.skip("compressed-tensors has no scales of such blocks")
    arguments = quantization.QuantizationArgs(
        num_bits=8,
        type="float",
        strategy=strategy,
        block_structure=[128, 128] if strategy == "block" else None,
    )
    values = matrix(shape, torch.bfloat16).float()
    rows, columns = (128, 128) if strategy == "block" else (1, shape[1])
    blocks = values.view(shape[0] // rows, rows, shape[1] // columns, columns)
    low, high = blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3))
    scale, _ = calculate_qparams(low, high, arguments)
    # Given zero points, all 0, it would lose the sign of zeros, which is all the same to a product.
    codes = quantize(values, scale, None, arguments, dtype=torch.float8_e4m3fn)
    encoder = CHANNEL if strategy == "channel" else BLOCK
    mine = encode(encoder, matrix(shape, torch.bfloat16))
    whole = high.abs().maximum(low.abs()) > 0
    assert whole.any()
    # Of zeros only alone the scales differ: they may have any.
    assert torch.equal(mine[1][whole], scale[whole])
    assert_bits((mine[0],), (codes,))
    if strategy == "channel":
        assert torch.equal(mine[1], scale)


def test_transformers_quantiser_differs_in_last_bits_of_scales_only():
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=None)
    quantise = Fp8Quantize(SimpleNamespace(quantization_config=config))
    values = matrix((512, 640), torch.bfloat16, spread=1.0)
    theirs = quantise.convert({"w.weight": values})
    codes, scale = encode(BLOCK, values)
    ulps = scale.view(torch.int32) - theirs["w.weight_scale_inv"].view(torch.int32)
    assert ulps.abs().max() <= 2
    assert scale[0, 0] == theirs["w.weight_scale_inv"][0, 0] == 1
    unequal = codes.view(torch.int8) != theirs["w.weight"].view(torch.int8)
    # A quotient on the boundary between two codes may fall to either side.
    assert unequal.float().mean() < 1e-3
    apart = codes.view(torch.int8).int() - theirs["w.weight"].view(torch.int8).int()
    assert apart.abs().max() <= 1


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_bfloat16_rounds_to_nearest_even(dtype):
    values = matrix((5, 7), torch.float64, spread=1.0).to(dtype)
    (raw,) = BFloat16().encode(values, "")
    expected = values.to(torch.bfloat16)
    assert raw.tobytes() == expected.view(torch.uint8).numpy().tobytes()
    assert raw.dtype == np.uint8
