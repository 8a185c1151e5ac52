"""vLLM, on a CPU in float32; with the MTP layer as its speculative decoding runs it."""

from __future__ import annotations

import pytest

from tests.clients.cases import BF16, FP8, GLM_CHANNEL, QWEN
from tests.clients.running import (
    TOLERANCE,
    assert_agrees,
    damage,
    largest_difference,
    lose,
    swap,
)

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("case", [*BF16, *FP8], ids=str)
def test_it_computes_what_the_hand_pruned_model_does(case, pruned, answer_of, note):
    made = pruned(case)
    drafts = made.expected.drafts is not None
    assert drafts == (case.source.mtp and case.mtp != "drop")
    answer = answer_of("vllm", made.directory, *["--mtp"] * drafts)
    note("vllm", case, assert_agrees(answer, made.expected, drafts))


def test_a_lost_expert_shows_because_its_place_is_poisoned(pruned, answer_of, tmp_path):
    made = pruned(QWEN)
    lost = lose("model.layers.2.mlp.experts.1.up_proj.weight")
    answer = answer_of("vllm", damage(made.directory, tmp_path / "damaged", lost))
    assert largest_difference(answer, made.expected) == float("inf")


def test_swapped_scales_show_in_the_numbers(pruned, answer_of, tmp_path):
    made = pruned(GLM_CHANNEL)
    scale = "model.layers.2.mlp.experts.{}.up_proj.weight_scale"
    change = swap(scale.format(0), scale.format(1))
    answer = answer_of("vllm", damage(made.directory, tmp_path / "damaged", change))
    assert largest_difference(answer, made.expected) > 100 * TOLERANCE


def test_a_lost_expert_of_the_mtp_layer_shows_in_the_drafts(pruned, answer_of, tmp_path):
    made = pruned(GLM_CHANNEL)
    lost = lose("model.layers.3.mlp.experts.1.up_proj.weight_scale")
    directory = damage(made.directory, tmp_path / "damaged", lost)
    answer = answer_of("vllm", directory, "--mtp")
    assert_agrees(answer, made.expected)
    with pytest.raises(AssertionError, match="draft"):
        assert_agrees(answer, made.expected, drafts=True)
