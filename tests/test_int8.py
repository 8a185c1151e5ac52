"""INT8 decoders against naive formulas of their formats, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reap_stream.formats import group_weights, known_formats
from reap_stream.formats.int8 import Int8
from tests.word_weights import decoded, refs_of, rounded


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
