"""mlx-lm, on a CPU, weights widened to float32."""

from __future__ import annotations

import pytest

from tests.clients.cases import BF16, QWEN
from tests.clients.running import assert_agrees, damage, lose

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("case", BF16, ids=str)
def test_it_computes_what_the_hand_pruned_model_does(case, pruned, answer_of, note):
    made = pruned(case)
    answer = answer_of("mlx", made.directory)
    note("mlx", case, assert_agrees(answer, made.expected))


def test_it_refuses_an_expert_that_is_not_whole(pruned, answer_of, tmp_path):
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    answer = answer_of("mlx", damage(pruned(QWEN).directory, tmp_path / "damaged", lose(name)))
    assert answer.status != 0
    assert f"KeyError: '{name}'" in answer.log


def test_it_refuses_an_expert_too_many(pruned, answer_of, tmp_path):
    def add(tensors):
        for name in [name for name in tensors if ".layers.2.mlp.experts.5." in name]:
            tensors[name.replace("experts.5", "experts.6")] = tensors[name].clone()

    answer = answer_of("mlx", damage(pruned(QWEN).directory, tmp_path / "damaged", add))
    assert answer.status != 0
    assert "Received 3 parameters not in model" in answer.log
