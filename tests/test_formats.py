"""Decoders against the formula of each format, over all codes there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.errors import CheckpointError
from reap_stream.formats import group_weights, known_formats
from reap_stream.formats.fp8 import Fp8

TAGS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def e4m3_values():
    """All 256 values of E4M3 "fn" from its definition: 1 sign, 4 exponent, 3 mantissa bits."""
    values = np.empty(256)
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent, mantissa = (code >> 3) & 0xF, code & 7
        if exponent == 15 and mantissa == 7:
            values[code] = np.nan
        elif exponent == 0:
            values[code] = sign * mantissa / 8 * 2.0**-6
        else:
            values[code] = sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return values


def ref(name, dtype, shape):
    return TensorRef(name, Path("model.safetensors"), dtype, tuple(shape), 0, 0)


def weight_of(shape, scale, suffix, block=(128, 128)):
    """The weight that a tensor of that shape and its scale make."""
    tensors = {"w": ref("w", "F8_E4M3", shape)}
    if scale is not None:
        tensors["w" + suffix] = ref("w" + suffix, TAGS[scale.dtype], scale.shape)
    fmt = Fp8(block)
    weight = fmt.claim("w", tensors)
    assert weight is not None
    return fmt, weight


LAYOUTS = [
    pytest.param((16, 16), (1, 1), "_scale_inv", (128, 128), id="block-larger-than-tensor"),
    pytest.param((160, 300), (2, 3), "_scale_inv", (128, 128), id="block-cut-short"),
    pytest.param((64, 48), (4, 2), "_scale_inv", (16, 32), id="block-not-square"),
    pytest.param((160, 300), (2, 3), "_scale", (128, 128), id="block-named-scale"),
    pytest.param((33, 40), (33, 1), "_scale", (128, 128), id="channel"),
    pytest.param((33, 40), (33,), "_scale", (128, 128), id="channel-flat"),
    pytest.param((33, 40), (), "_scale", (128, 128), id="tensor"),
    pytest.param((33, 40), (1,), "_scale", (128, 128), id="tensor-of-one"),
]


@pytest.mark.parametrize(("shape", "scale_shape", "suffix", "block"), LAYOUTS)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_decodes_to_code_times_scale(shape, scale_shape, suffix, block, scale_dtype, dtype):
    generator = torch.Generator().manual_seed(1)
    codes = torch.arange(shape[0] * shape[1], dtype=torch.int64).remainder(256).to(torch.uint8)
    codes = codes[torch.randperm(len(codes), generator=generator)].view(shape)
    scale = (torch.rand(scale_shape, generator=generator) + 0.1).to(scale_dtype)
    fmt, weight = weight_of(shape, scale, suffix, block)
    assert fmt.refusal(weight) is None
    out = torch.empty(shape, dtype=dtype)
    fmt.decode(weight, {"weight": codes.view(torch.float8_e4m3fn), "scale": scale}, out)

    grid = scale.float().numpy()
    height, width = {"channel": (1, shape[1]), "tensor": shape}.get(
        "tensor" if scale.numel() == 1 else "channel" if scale.numel() == shape[0] else "", block
    )
    expected = np.empty(shape, np.float32)
    values = e4m3_values()
    for i in range(shape[0]):
        for j in range(shape[1]):
            number = grid.reshape(-(-shape[0] // height), -1)[i // height, j // width]
            expected[i, j] = np.float32(values[codes[i, j]]) * number
    np.testing.assert_array_equal(out.float().numpy(), as_rounded(expected, dtype))


def as_rounded(values, dtype):
    return torch.from_numpy(values).to(dtype).float().numpy()


def test_every_code_has_the_value_of_the_definition():
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    fmt, weight = weight_of((16, 16), torch.ones(()), "_scale")
    out = torch.empty(16, 16)
    fmt.decode(weight, {"weight": codes.view(torch.float8_e4m3fn), "scale": torch.ones(())}, out)
    np.testing.assert_array_equal(out.numpy().reshape(-1), e4m3_values().astype(np.float32))
    np.testing.assert_array_equal(np.signbit(out.numpy().reshape(-1)[[0, 128]]), [False, True])


def test_decoding_into_part_of_a_larger_matrix():
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scale = torch.rand(16, 1) + 0.5
    fmt, weight = weight_of((16, 16), scale, "_scale")
    parts = {"weight": codes.view(torch.float8_e4m3fn), "scale": scale}
    whole, alone = torch.zeros(16, 40), torch.empty(16, 16)
    fmt.decode(weight, parts, whole[:, 8:24])
    fmt.decode(weight, parts, alone)
    torch.testing.assert_close(whole[:, 8:24], alone, rtol=0, atol=0, equal_nan=True)
    assert not whole[:, :8].any()
    assert not whole[:, 24:].any()


@pytest.mark.parametrize(
    ("shape", "scale", "suffix", "match"),
    [
        ((16, 16), None, "_scale", "has no scale"),
        ((300, 300), torch.ones(2, 2), "_scale_inv", r"\[2, 2\].*\[300, 300\]"),
        ((16, 16), torch.ones(8, 1), "_scale", r"\[8, 1\]"),
        ((4, 16, 16), torch.ones(3, 1, 1), "_scale", r"\[3, 1, 1\], expected 4 experts"),
        ((4, 16, 16), torch.ones(4, 3, 1), "_scale", r"\[4, 3, 1\]"),
        ((2, 4, 16, 16), torch.ones(2, 4, 1, 1), "_scale", "4 dimensions"),
    ],
)
def test_what_cannot_be_decoded_is_refused(shape, scale, suffix, match):
    fmt, weight = weight_of(shape, scale, suffix)
    reason = fmt.refusal(weight)
    assert reason is not None
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(reason)


def test_scales_are_no_weights_and_stand_beside_theirs():
    tensors = {
        "a.weight": ref("a.weight", "F8_E4M3", (8, 8)),
        "a.weight_scale_inv": ref("a.weight_scale_inv", "F32", (1, 1)),
        "b.weight": ref("b.weight", "BF16", (8, 8)),
        "c.weight_scale": ref("c.weight_scale", "F32", (1,)),
    }
    weights = group_weights(tensors, known_formats({}))
    assert set(weights) == {"a.weight", "b.weight", "c.weight_scale"}
    assert weights["a.weight"].parts["scale"].name == "a.weight_scale_inv"
    assert not weights["a.weight"].is_plain
    assert weights["b.weight"].is_plain


@pytest.mark.parametrize("block", [[128], [128, 0], [128, "128"], [0, 128], [1, 2, 3]])
def test_malformed_block_sizes_are_refused(block):
    with pytest.raises(CheckpointError, match="weight_block_size"):
        known_formats({"quantization_config": {"weight_block_size": block}})
