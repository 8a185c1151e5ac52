"""GPTQ and AWQ decoders against naive formulas of their formats, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reap_stream.formats.awq import Awq
from reap_stream.formats.gptq import Gptq
from tests.word_weights import claimed, decoded, random_awq, random_gptq, rounded
from tests.words import pack_awq, pack_gptq

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


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
