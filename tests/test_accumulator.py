"""The running sums of a layer against the definition, on both of their paths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reap_stream.scoring.accumulator import SaliencyAccumulator
from reap_stream.scoring.saliency import SUMS

EXPERTS, SOURCES, HIDDEN = 5, 3, 40
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_batch(seed, dtype, n=60):
    """Outputs, their experts, gate weights, and shares: 2 * source + half."""
    generator = torch.Generator().manual_seed(seed)
    rows = (3 * torch.randn(n, HIDDEN, generator=generator)).to(dtype)
    experts = torch.randint(0, EXPERTS - 1, (n,), generator=generator)
    gates = torch.rand(n, generator=generator)
    shares = torch.randint(0, 2 * SOURCES, (n,), generator=generator, dtype=torch.int32)
    return rows, experts, gates, shares


def naive(batches):
    """Every statistic by its definition, a token at a time in float64."""
    names = [*SUMS, *(f"odd.{name}" for name in SUMS), "norm_max", "output_max"]
    found = {name: np.zeros((SOURCES, EXPERTS)) for name in names}
    for rows, experts, gates, shares in batches:
        for row, expert, gate, share in zip(
            rows.double().numpy(), experts.tolist(), gates.tolist(), shares.tolist(), strict=True
        ):
            norm = np.sqrt((row * row).sum())
            if not np.isfinite(norm):
                continue
            cell = share // 2, expert
            terms = zip(SUMS, (1, gate, norm, gate * norm), strict=True)
            for name, term in terms:
                found[name][cell] += term
                found[f"odd.{name}"][cell] += term * (share % 2)
            found["norm_max"][cell] = max(found["norm_max"][cell], norm)
            found["output_max"][cell] = max(found["output_max"][cell], np.abs(row).max())
    return found


def add(accumulator, batch, *, whole):
    """Hands over a batch at once, or expert by expert as the extension takes it."""
    rows, experts, gates, shares = batch
    if whole:
        accumulator.add(experts, rows, gates, shares)
        return
    for expert in range(EXPERTS):
        mine = experts == expert
        accumulator.add(expert, rows[mine], gates[mine], shares[mine])


def assert_is(stats, expected, rtol):
    stats.check()
    assert stats.arrays().keys() == expected.keys()
    for name, array in stats.arrays().items():
        np.testing.assert_allclose(array, expected[name], rtol=rtol, err_msg=name)


@pytest.mark.parametrize("paths", [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_their_definitions(paths, dtype):
    accumulator = SaliencyAccumulator(EXPERTS, SOURCES, torch.device("cpu"))
    batches = [make_batch(seed, dtype) for seed in range(2)]
    for batch, whole in zip(batches, paths, strict=True):
        add(accumulator, batch, whole=whole)
    stats, lost = accumulator.finish()
    assert lost == 0
    # torch takes norms in float32.
    assert_is(stats, naive(batches), 1e-6 if any(paths) else 1e-13)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_not_finite_is_left_out_of_every_statistic(whole, value):
    accumulator = SaliencyAccumulator(EXPERTS, SOURCES, torch.device("cpu"))
    batch = make_batch(0, torch.float32)
    batch[0][7, 3] = value
    add(accumulator, batch, whole=whole)
    stats, lost = accumulator.finish()
    assert lost == 1
    assert_is(stats, naive([batch]), 1e-6)


def test_the_sums_are_the_same_bits_each_time():
    found = []
    for _ in range(2):
        accumulator = SaliencyAccumulator(EXPERTS, SOURCES, torch.device("cpu"))
        for seed in range(3):
            add(accumulator, make_batch(seed, torch.bfloat16), whole=False)
        stats, _ = accumulator.finish()
        found.append({name: array.tobytes() for name, array in stats.arrays().items()})
    assert found[0] == found[1]
