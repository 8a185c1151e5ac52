"""mistral.rs, on a CPU in float32."""

from __future__ import annotations

import pytest

from tests.clients.cases import BF16, QWEN
from tests.clients.running import assert_agrees, damage, lose

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("case", BF16, ids=str)
def test_it_computes_what_the_hand_pruned_model_does(case, pruned, answer_of, note):
    made = pruned(case)
    answer = answer_of("mistralrs", made.directory)
    note("mistralrs", case, assert_agrees(answer, made.expected))


def test_it_refuses_an_expert_that_is_not_whole(pruned, answer_of, tmp_path):
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    answer = answer_of(
        "mistralrs", damage(pruned(QWEN).directory, tmp_path / "damaged", lose(name))
    )
    assert answer.status != 0
    assert f"cannot find tensor {name}" in answer.log
