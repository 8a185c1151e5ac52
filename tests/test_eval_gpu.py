"""The evaluation on a CUDA device and on the CPU."""

from __future__ import annotations

import pytest
import torch

from reap_stream.evaluating import evaluate
from reap_stream.settings import Candidate
from tests.engine import prune_to
from tests.evaluation import eval_settings, make_scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILIES = ["glm4_moe", "gpt_oss", "deepseek_v4", "gemma4_text", "inkling2_text", "granitemoe"]


@pytest.fixture(autouse=True)
def _exact_products():
    """float32 products in float32, as the CPU's are."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("family_id", FAMILIES)
def test_the_device_finds_what_the_cpu_finds(family_id, tiny, calibration, tmp_path):
    source = tiny(family_id)
    scores = make_scores(source, tmp_path / "scores.safetensors")
    pruned = prune_to(tmp_path / "pruned", source, calibration, 4)
    candidates = (Candidate(scores, 4), Candidate(scores, 6))
    expected, found = (
        evaluate(eval_settings([source, pruned], calibration, candidates=candidates, device=device))
        for device in ("cpu", "cuda")
    )
    assert found.device_nbytes > 0
    for mine, theirs in zip(found.results, expected.results, strict=True):
        assert mine.all.loss == pytest.approx(theirs.all.loss, rel=1e-4)
        assert mine.all.kl == pytest.approx(theirs.all.kl, rel=1e-3, abs=1e-6)
        assert mine.layers == pytest.approx(theirs.layers, rel=1e-3, abs=1e-6)
