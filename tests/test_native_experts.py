"""Saliency and combine: naive formulas as oracles, the same bits on every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reap_stream import _native

ISAS = _native.available_isas()
TORCH_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
DTYPES = list(TORCH_DTYPES)
DIMS = [1, 7, 8, 16, 31, 32, 33, 64, 100, 2051]
NAMES = ("tokens", "gate_sum", "norm_sum", "gate_norm_sum", "norm_max", "output_max")


def make_rows(n, dim, dtype, seed=0):
    rows = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) * 3
    return rows.to(TORCH_DTYPES[dtype])


def raw(rows):
    return rows.view(torch.int32 if rows.dtype == torch.float32 else torch.int16).numpy()


def make_gates(n, seed=1):
    return np.random.default_rng(seed).random(n, dtype=np.float32)


def zero_sums(num_sources):
    return [np.zeros(num_sources, np.int64), *(np.zeros(num_sources) for _ in range(5))]


def saliency(rows, dtype, gates, sources, sums, **options):
    return _native.saliency(raw(rows), dtype, gates, sources, *sums, rows.shape[1], **options)


def naive_saliency(rows, gates, sources, num_sources):
    """Equation 9's sums, a row at a time in float64."""
    sums = zero_sums(num_sources)
    for row, gate, source in zip(
        rows.double().numpy(), gates.astype(np.float64), sources, strict=True
    ):
        norm = np.sqrt(np.sum(row * row))
        for total, term in zip(sums, (1, gate, norm, gate * norm), strict=False):
            total[source] += term
        sums[4][source] = max(sums[4][source], norm)
        sums[5][source] = max(sums[5][source], np.abs(row).max())
    return sums


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_saliency_is_the_naive_formula(dim, dtype, isa):
    n, num_sources = 37, 3
    rows, gates = make_rows(n, dim, dtype), make_gates(n)
    sources = np.random.default_rng(2).integers(0, num_sources, n, dtype=np.int32)
    sums = zero_sums(num_sources)
    assert saliency(rows, dtype, gates, sources, sums, isa=isa) == 0
    for name, got, want in zip(
        NAMES, sums, naive_saliency(rows, gates, sources, num_sources), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-14, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 60),
    dim=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_saliency_has_the_same_bits_on_every_path(n, dim, dtype, threads, seed):
    rows, gates = make_rows(n, dim, dtype, seed), make_gates(n, seed)
    sources = np.random.default_rng(seed).integers(0, 2, n, dtype=np.int32)
    results = []
    for isa in ISAS:
        sums = zero_sums(2)
        saliency(rows, dtype, gates, sources, sums, isa=isa, threads=threads)
        results.append([array.tobytes() for array in sums])
    assert all(result == results[0] for result in results)


def test_saliency_of_much_work_does_not_depend_on_threads():
    rows, gates = make_rows(1500, 1000, "bf16"), make_gates(1500)
    sources = np.zeros(1500, np.int32)
    results = []
    for threads in (1, 2, 7):
        sums = zero_sums(1)
        saliency(rows, "bf16", gates, sources, sums, threads=threads)
        results.append([array.tobytes() for array in sums])
    assert results[0] == results[1] == results[2]


def test_saliency_adds_to_what_is_there():
    rows, gates = make_rows(20, 50, "f32"), make_gates(20)
    sources = np.zeros(20, np.int32)
    whole, halves = zero_sums(1), zero_sums(1)
    saliency(rows, "f32", gates, sources, whole)
    for part in (slice(0, 11), slice(11, 20)):
        saliency(rows[part], "f32", gates[part], sources[part], halves)
    assert [a.tobytes() for a in whole] == [a.tobytes() for a in halves]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_saliency_leaves_out_rows_that_are_not_finite(value, dtype, isa):
    rows, gates = make_rows(6, 40, dtype), make_gates(6)
    rows[1, 39] = value
    rows[4, 0] = value
    gates[5] = np.nan
    sources = np.zeros(6, np.int32)
    sums = zero_sums(1)
    assert saliency(rows, dtype, gates, sources, sums, isa=isa) == 3
    good = [0, 2, 3]
    expected = naive_saliency(rows[good], gates[good], sources[good], 1)
    for got, want in zip(sums, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-14)


@pytest.mark.parametrize("isa", ISAS)
def test_saliency_of_huge_float32_does_not_overflow(isa):
    rows = torch.full((1, 100), 3e38)
    sums = zero_sums(1)
    assert saliency(rows, "f32", np.ones(1, np.float32), np.zeros(1, np.int32), sums, isa=isa) == 0
    np.testing.assert_allclose(sums[2], [float(rows[0, 0]) * 10], rtol=1e-14)


@pytest.mark.parametrize("source", [-1, 2, 2**31 - 1])
def test_saliency_refuses_an_unknown_source_before_it_adds(source):
    sums = zero_sums(2)
    sources = np.array([0, 1, source], np.int32)
    with pytest.raises(ValueError, match=rf"sources\[2\] is {source}; there are 2 sources"):
        saliency(make_rows(3, 8, "f32"), "f32", make_gates(3), sources, sums)
    assert all(not array.any() for array in sums)


def combine(rows, dtype, gates, tokens, out, **options):
    _native.combine(raw(rows), dtype, gates, tokens, out, rows.shape[1], **options)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_combine_is_index_add(dim, dtype, isa):
    n, num_tokens = 41, 9  # tokens repeat
    rows, gates = make_rows(n, dim, dtype), make_gates(n)
    tokens = np.random.default_rng(3).integers(0, num_tokens, n)
    start = torch.randn(num_tokens, dim, generator=torch.Generator().manual_seed(4))
    out = start.numpy().copy()
    combine(rows, dtype, gates, tokens, out, isa=isa)
    weighted = rows.float() * torch.from_numpy(gates)[:, None]
    expected = start.clone().index_add_(0, torch.from_numpy(tokens), weighted)
    np.testing.assert_array_equal(out, expected.numpy())


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 40),
    dim=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_combine_has_the_same_bits_on_every_path(n, dim, dtype, threads, seed):
    rows, gates = make_rows(n, dim, dtype, seed), make_gates(n, seed)
    tokens = np.random.default_rng(seed).integers(0, 5, n)
    results = []
    for isa in ISAS:
        out = np.ones((5, dim), np.float32)
        combine(rows, dtype, gates, tokens, out, isa=isa, threads=threads)
        results.append(out.tobytes())
    assert all(result == results[0] for result in results)


def test_combine_of_much_work_does_not_depend_on_threads():
    rows, gates = make_rows(900, 1111, "bf16"), make_gates(900)
    tokens = np.random.default_rng(5).integers(0, 50, 900)
    results = []
    for threads in (1, 2, 7, 64):
        out = np.zeros((50, 1111), np.float32)
        combine(rows, "bf16", gates, tokens, out, threads=threads)
        results.append(out.tobytes())
    assert len(set(results)) == 1


@pytest.mark.parametrize("token", [-1, 4, 2**62])
def test_combine_refuses_an_unknown_token_before_it_adds(token):
    out = np.zeros((4, 8), np.float32)
    tokens = np.array([0, token], np.int64)
    with pytest.raises(ValueError, match=rf"tokens\[1\] is {token}; out has 4 rows"):
        combine(make_rows(2, 8, "f32"), "f32", make_gates(2), tokens, out)
    assert not out.any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_start_at_any_address(dtype, isa):
    rows, gates = make_rows(5, 37, dtype), make_gates(5)
    content = raw(rows).tobytes()
    moved = memoryview(b"\xa5" + content)[1:]
    zeros, tokens = np.zeros(5, np.int32), np.arange(5)
    results = []
    for data in (raw(rows), moved):
        sums, out = zero_sums(1), np.zeros((5, 37), np.float32)
        _native.saliency(data, dtype, gates, zeros, *sums, 37, isa=isa)
        _native.combine(data, dtype, gates, tokens, out, 37, isa=isa)
        results.append([array.tobytes() for array in (*sums, out)])
    assert results[0] == results[1]
