"""The same tiny models on a CUDA device and on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reap_stream.scoring.saliency import expert_scores
from reap_stream.scoring.selection import select
from tests.builders import quantise
from tests.engine import prepare, prune_to, read_kept, stream
from tests.families import BY_ID, FAMILIES
from tests.oracle_pruning import assert_kept_bytes
from tests.test_formats import LAYOUTS, weight_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KEEP = 4


@pytest.fixture(autouse=True)
def _exact_products():
    """float32 products in float32, as the CPU's are."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def kept(streamed, groups):
    return {
        layer: select(expert_scores(stats, "reap", 0, layer), KEEP, groups)
        for layer, stats in streamed.stats.items()
    }


@pytest.mark.parametrize(
    "memory",
    [
        pytest.param({"grouped": False}, id="each"),
        pytest.param({"grouped": True}, id="grouped"),
        pytest.param({"grouped": False, "expert_slots": 3}, id="streamed"),
        pytest.param({"grouped": True, "expert_slots": 3}, id="grouped-streamed"),
        pytest.param({"grouped": True, "spill": True}, id="spilled"),
    ],
)
@pytest.mark.parametrize("family_id", [family.id for family in FAMILIES])
def test_the_device_decides_as_the_cpu_does(memory, family_id, tiny, calibration, tmp_path):
    source = tiny(family_id)
    expected = stream(prepare(source, calibration), tmp_path)
    found = stream(prepare(source, calibration, device="cuda"), tmp_path, **memory)
    groups = BY_ID[family_id].groups
    assert kept(found, groups) == kept(expected, groups)
    for layer, stats in expected.stats.items():
        np.testing.assert_array_equal(found.stats[layer].tokens, stats.tokens)
        np.testing.assert_array_equal(found.stats[layer].odd.tokens, stats.odd.tokens)
        np.testing.assert_allclose(found.stats[layer].output_max, stats.output_max, rtol=1e-3)
        mine, theirs = (expert_scores(s, "reap", 0, layer) for s in (found.stats[layer], stats))
        np.testing.assert_allclose(mine, theirs, rtol=1e-4)
    for got, wanted in zip(found.states, expected.states, strict=True):
        for mine, theirs in zip(got, wanted, strict=True):
            assert (mine.cpu() - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
def test_fp8_checkpoints(scheme, tiny, calibration, tmp_path):
    stored, _ = quantise(tiny("glm4_moe"), tmp_path, scheme, torch.float32, 24)
    mine = prune_to(tmp_path / "cuda", stored, calibration, KEEP, device="cuda")
    theirs = prune_to(tmp_path / "cpu", stored, calibration, KEEP)
    assert read_kept(mine) == read_kept(theirs)
    assert_kept_bytes(stored, mine, read_kept(mine))


@pytest.mark.parametrize("family_id", ["glm4_moe", "gpt_oss", "qwen3_next"])
def test_pruned_propagation(family_id, tiny, calibration, tmp_path):
    source, option = tiny(family_id), {"propagate": "pruned"}
    mine = prune_to(tmp_path / "cuda", source, calibration, KEEP, device="cuda", **option)
    theirs = prune_to(tmp_path / "cpu", source, calibration, KEEP, **option)
    assert read_kept(mine) == read_kept(theirs)


@pytest.mark.parametrize("family_id", ["glm4_moe", "mixtral"])
def test_bfloat16_runs_are_as_good_as_the_cpus(family_id, tiny, calibration, tmp_path):
    source = tiny(family_id)
    exact = stream(prepare(source, calibration), tmp_path).states
    options = {"compute_dtype": "bfloat16"}
    cpu = stream(prepare(source, calibration, **options), tmp_path).states
    cuda = stream(prepare(source, calibration, device="cuda", **options), tmp_path).states
    for right, mine, theirs in zip(exact, cuda, cpu, strict=True):
        truth, got, other = (torch.cat(part).float() for part in (right, mine, theirs))
        assert (got.cpu() - truth).norm() < 2 * (other - truth).norm()


@pytest.mark.parametrize(("shape", "scale_shape", "suffix", "block"), LAYOUTS)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_decodes_to_the_cpus_bits(shape, scale_shape, suffix, block, scale_dtype, dtype):
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    scale = (torch.rand(scale_shape, generator=generator) + 0.1).to(scale_dtype)
    fmt, weight = weight_of(shape, scale, suffix, block)
    parts = {"weight": codes.view(torch.float8_e4m3fn), "scale": scale}
    here = torch.empty(shape, dtype=dtype)
    there = torch.empty(shape, dtype=dtype, device="cuda")
    fmt.decode(weight, parts, here)
    fmt.decode(weight, {role: part.cuda() for role, part in parts.items()}, there)
    # The bits of NaN are not promised, all others are.
    numbers = ~here.isnan()
    assert torch.equal(there.cpu().isnan(), here.isnan())
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(there.cpu().view(whole)[numbers], here.view(whole)[numbers])
