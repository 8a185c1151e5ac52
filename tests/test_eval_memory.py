"""Every layer is read once for everyone, and memory that is short changes no figure."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from reap_stream.checkpoint.reader import Reader
from reap_stream.demands import Demands
from reap_stream.errors import UsageError
from reap_stream.evaluating import evaluate
from reap_stream.evaluation import budget
from reap_stream.memory import BudgetError, plan_memory
from reap_stream.settings import Candidate, ChoiceSettings
from tests.engine import prune_to
from tests.evaluation import eval_settings, make_scores

MIB = 2**20


@pytest.fixture
def read(monkeypatch):
    """Counts how many bytes of each tensor are read."""
    found = Counter()
    parts = Reader.read_into

    def read_parts(self, requests):
        for ref, _, nbytes, _ in requests:
            found[ref.name] += nbytes
        return parts(self, requests)

    monkeypatch.setattr(Reader, "read_into", read_parts)
    return found


@pytest.mark.parametrize("family_id", ["glm4_moe", "gpt_oss", "deepseek_v4"])
def test_each_weight_of_a_layer_is_read_once_for_all(family_id, tiny, calibration, read, tmp_path):
    source = tiny(family_id)
    scores = make_scores(source, tmp_path / "scores.safetensors")
    read.clear()
    evaluate(eval_settings([source], calibration))
    alone = {name: nbytes for name, nbytes in read.items() if "layers." in name}
    read.clear()
    candidates = [
        Candidate(scores, keep, ChoiceSettings(m)) for keep in (4, 6) for m in ("reap", "ean")
    ]
    evaluate(eval_settings([source], calibration, candidates=tuple(candidates)))
    assert {name: nbytes for name, nbytes in read.items() if "layers." in name} == alone
    assert len(alone) > 20


def test_a_checkpoint_with_the_same_head_shares_it(tiny, calibration, read, tmp_path):
    source = tiny("glm4_moe")
    pruned = prune_to(tmp_path / "pruned", source, calibration, 4)
    read.clear()
    evaluate(eval_settings([source, pruned], calibration))
    # Once to compare, of both; once to load.
    head = 96 * 32 * 4
    assert read["lm_head.weight"] == 3 * head


@pytest.fixture
def short(monkeypatch):
    """Plans as if memory held few experts, no hidden states and few logits."""

    def plan(*arguments, **options):
        made = plan_memory(*arguments, **options)
        return replace(made, spill=True, expert_slots=4)

    monkeypatch.setattr(budget, "plan_memory", plan)
    monkeypatch.setattr(budget, "_MOST_SLICE_NBYTES", 96 * 4 * 4 * 5)


@pytest.mark.parametrize("family_id", ["glm4_moe", "glm_moe_dsa", "deepseek_v4", "inkling2_text"])
def test_short_memory_changes_no_figure(
    family_id, tiny, calibration, tmp_path, request, monkeypatch
):
    source = tiny(family_id)
    scores = make_scores(source, tmp_path / "scores.safetensors")
    settings = eval_settings(
        [source], calibration, candidates=(Candidate(scores, 4),), scratch=tmp_path
    )
    ample = evaluate(settings)
    request.getfixturevalue("short")
    tight = evaluate(settings)
    assert tight.settings["hidden_states_in_file"]
    assert not ample.settings["hidden_states_in_file"]
    assert any("memory holds 4 of 8 experts" in note for note in tight.notes)
    for mine, theirs in zip(tight.results, ample.results, strict=True):
        assert mine.all.loss == pytest.approx(theirs.all.loss, rel=1e-6)
        assert mine.all.kl == pytest.approx(theirs.all.kl, rel=1e-5, abs=1e-9)
        assert mine.all.top1_agreement == theirs.all.top1_agreement
        assert mine.layers == theirs.layers
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]


def test_a_place_for_files_that_is_none_is_refused_first(calibration, tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(UsageError, match="missing: no place for hidden states"):
        evaluate(eval_settings([tmp_path / "no model"], calibration, scratch=missing))


def test_a_budget_that_cannot_hold_it_is_refused(tiny, calibration):
    with pytest.raises(BudgetError, match=r"needs at least .*; raise --memory"):
        evaluate(eval_settings([tiny("glm4_moe")], calibration, memory=64 * MIB))


class Head:
    """As large as said."""

    def __init__(self, nbytes):
        self.nbytes = nbytes
        self.loading_nbytes = 2 * nbytes


DEMANDS = Demands(
    dense=MIB, largest_tensor=0, slot=MIB, fused=0, expert=MIB, decode=0, per_token=1,
    num_experts=8, longest_row=64,
)  # fmt: skip


def plan(monkeypatch, heads, *, budget_mib, hidden_mib=1):
    """The plan of a process that holds nothing yet."""
    monkeypatch.setattr("reap_stream.memory.resident_nbytes", lambda: 0)
    monkeypatch.setattr(budget, "resident_nbytes", lambda: 0)
    return budget.plan_evaluation(
        DEMANDS,
        hidden_nbytes=hidden_mib * MIB,
        heads=heads,
        budget=budget_mib * MIB,
        batch_tokens=64,
        device=torch.device("cpu"),
    )


def test_heads_count_once_and_beside_hidden_states(monkeypatch):
    head = Head(200 * MIB)
    # 128 MiB for libraries, the weights, and again as much while they are loaded.
    assert plan(monkeypatch, [head, head], budget_mib=528).layers.peak_host == 528 * MIB
    with pytest.raises(BudgetError, match=r"the heads of these models need at least 0\.52 GiB"):
        plan(monkeypatch, [head, head], budget_mib=527)
    with pytest.raises(BudgetError, match=r"the heads of these models need at least 0\.72 GiB"):
        plan(monkeypatch, [head, Head(200 * MIB)], budget_mib=528)


def test_hidden_states_go_to_a_file_where_heads_need_the_room(monkeypatch):
    small, large = Head(10 * MIB), Head(200 * MIB)
    with_small = plan(monkeypatch, [small], budget_mib=560, hidden_mib=100)
    with_large = plan(monkeypatch, [large], budget_mib=560, hidden_mib=100)
    assert (with_small.layers.spill, with_large.layers.spill) == (False, True)
    for planned in (with_small, with_large):
        assert planned.layers.peak_host <= 560 * MIB
        assert planned.slice_nbytes >= 32 * MIB
