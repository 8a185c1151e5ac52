"""Experts that do not go through transformers' experts call, apart from the parity of families."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from reap_stream.model.adapters import attach_experts, find_adapter
from reap_stream.model.adapters.base import run_own_forward
from reap_stream.model.experts import BatchTokens, RoutedExperts
from reap_stream.scoring.accumulator import SaliencyAccumulator
from tests.builders import tiny_model
from tests.engine import prepare, prune_to, read_kept, stream
from tests.families import BY_ID
from tests.oracle import experts_modules

KINDS = {
    "qwen3_moe": "CalledExperts",
    "step3p7": "LoopedExperts",
    "llama4_text": "Llama4Experts",
    "dbrx": "DbrxExperts",
}
OWN = [name for name in KINDS if name != "qwen3_moe" and name in BY_ID]


@pytest.mark.parametrize("family_id", [name for name in KINDS if name in BY_ID])
def test_each_kind_is_recognised_by_its_adapter_alone(family_id):
    for module in experts_modules(tiny_model(BY_ID[family_id])).values():
        adapter = find_adapter(module)
        assert type(adapter).__name__ == KINDS[family_id]
        assert adapter.counts(module) == {8}


@pytest.mark.parametrize("module", [nn.Linear(4, 4), nn.ModuleList(), nn.Module()])
def test_other_modules_hold_no_experts(module):
    assert find_adapter(module) is None


class _Alike(nn.Module):
    """Takes what looped experts take, and has other parameters."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(8, 4, 4))
        self.weights = nn.Parameter(torch.zeros(8, 4, 4))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states * top_k_weights.sum() * top_k_index.sum()


def test_a_forward_alike_does_not_make_a_module_experts():
    assert find_adapter(_Alike()) is None


@pytest.mark.parametrize("family_id", OWN)
def test_detached_experts_are_as_before(family_id):
    model = tiny_model(BY_ID[family_id])
    paths = {id(module): name for name, module in model.named_modules()}
    before = [set(vars(module)) for module in model.modules()]
    for module in experts_modules(model).values():
        attach_experts(model, paths[id(module)], lambda hidden, _index, _gates: hidden)
        assert [set(vars(module)) for module in model.modules()] != before
        attach_experts(model, paths[id(module)], None)
    assert [set(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("family_id", OWN)
def test_asking_for_grouped_products_changes_nothing(family_id, tiny, calibration, tmp_path):
    ready = prepare(tiny(family_id), calibration)
    (tmp_path / "one").mkdir()
    apart, grouped = stream(ready, tmp_path), stream(ready, tmp_path / "one", grouped=True)
    for mine, theirs in zip(apart.states, grouped.states, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for layer, stats in apart.stats.items():
        assert (stats.tokens == grouped.stats[layer].tokens).all()


@pytest.mark.parametrize("family_id", OWN)
def test_few_experts_in_memory_change_nothing(family_id, tiny, calibration, tmp_path):
    ready = prepare(tiny(family_id), calibration)
    (tmp_path / "few").mkdir()
    everything, few = stream(ready, tmp_path), stream(ready, tmp_path / "few", expert_slots=3)
    for layer, stats in everything.stats.items():
        assert (stats.gate_norm_sum == few.stats[layer].gate_norm_sum).all()


@pytest.mark.parametrize("family_id", OWN)
def test_later_layers_may_run_on_pruned_ones(family_id, tiny, calibration, tmp_path):
    first = prune_to(tmp_path / "a", tiny(family_id), calibration, 8, propagate="pruned")
    assert set(map(len, read_kept(first).values())) == {8}
    second = prune_to(tmp_path / "b", tiny(family_id), calibration, 4, propagate="pruned")
    original = prune_to(tmp_path / "c", tiny(family_id), calibration, 4)
    layer = min(read_kept(original))
    assert read_kept(second)[layer] == read_kept(original)[layer]


class _Store:
    def __init__(self, module):
        self._module = module

    def parameters(self, expert, *_):
        return {name: p[expert].detach() for name, p in self._module.named_parameters()}


def llama4_runner(statistics):
    module = experts_modules(tiny_model(BY_ID["llama4_text"]))[0]
    runner = RoutedExperts(module, _Store(module), 2, statistics=statistics)
    runner.batch = BatchTokens(torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int32))
    return module, runner


def test_a_gate_on_the_input_is_measured_by_what_the_expert_adds():
    statistics = SaliencyAccumulator(8, 1, torch.device("cpu"))
    module, runner = llama4_runner(statistics)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 1], [0, 2], [3, 0]])
    gates = torch.tensor([[0.5, 0.25], [0.9, 1e-3], [0.7, 0.1]])
    out = runner(hidden, index, gates)
    whole = torch.zeros(8, 3, 32)
    for token in range(3):
        for slot in range(2):
            whole[index[token, slot], token] = hidden[token] * gates[token, slot]
    added = copy.deepcopy(module)(whole.flatten(0, 1)).view(8, 3, 32).detach()
    torch.testing.assert_close(out, added.sum(0), rtol=1e-5, atol=1e-6)
    stats, lost = statistics.finish()
    assert lost == 0
    contributions = added.norm(dim=-1).sum(dim=1)
    torch.testing.assert_close(
        torch.from_numpy(stats.gate_norm_sum[0]).float(), contributions, rtol=1e-5, atol=1e-7
    )
    assert stats.gate_sum[0, 0] == pytest.approx(1.5)


def test_a_gate_that_rounded_to_zero_leaves_sound_statistics():
    statistics = SaliencyAccumulator(8, 1, torch.device("cpu"))
    _, runner = llama4_runner(statistics)
    out = runner(torch.ones(3, 32), torch.tensor([[0, 1]] * 3), torch.tensor([[0.0, 0.5]] * 3))
    stats, lost = statistics.finish()
    assert lost == 0
    stats.check()
    assert torch.isfinite(out).all()
    assert stats.tokens[0, :2].tolist() == [0, 3]
    assert stats.gate_norm_sum[0, 0] == 0


def test_a_modules_own_code_runs_whatever_its_forward_was_replaced_by():
    module = nn.Linear(3, 2)
    module.forward = None
    weight, bias, rows = torch.randn(4, 3), torch.randn(4), torch.randn(5, 3)
    made = run_own_forward(module, {"weight": weight, "bias": bias}, rows)
    torch.testing.assert_close(made, nn.functional.linear(rows, weight, bias))
    assert module.weight.shape == (2, 3)
