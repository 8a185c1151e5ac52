"""llama.cpp: its own converter to float32 GGUF, its own runtime."""

from __future__ import annotations

import pytest

from tests.clients.cases import BF16, FP8, GLM_CHANNEL, QWEN
from tests.clients.running import (
    TOLERANCE,
    assert_agrees,
    damage,
    largest_difference,
    lose,
)

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("case", [*BF16, *FP8], ids=str)
def test_it_computes_what_the_hand_pruned_model_does(case, pruned, answer_of, note):
    made = pruned(case)
    answer = answer_of("llamacpp", made.directory)
    note("llamacpp", case, assert_agrees(answer, made.expected))


def test_it_refuses_an_expert_that_is_not_whole(pruned, answer_of, tmp_path):
    lost = lose("model.layers.2.mlp.experts.1.up_proj.weight")
    answer = answer_of("llamacpp", damage(pruned(QWEN).directory, tmp_path / "damaged", lost))
    assert answer.status != 0
    assert "Unprocessed experts" in answer.log


def test_a_lost_scale_shows_in_the_numbers_alone(pruned, answer_of, tmp_path):
    made = pruned(GLM_CHANNEL)
    lost = lose("model.layers.2.mlp.experts.1.up_proj.weight_scale")
    answer = answer_of("llamacpp", damage(made.directory, tmp_path / "damaged", lost))
    assert largest_difference(answer, made.expected) > 100 * TOLERANCE
