"""How ranks on one machine share its memory and its devices."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from reap_stream.demands import Demands
from reap_stream.errors import UsageError
from reap_stream.memory import MemoryPlan, Sharers, plan_memory
from reap_stream.ranks.base import ALONE
from reap_stream.resident import available_nbytes
from reap_stream.sharing import own_device, share_memory, sharers
from tests.rank_threads import Threads, together

PLAN = MemoryPlan(10**9, 0, 8, False, 10**8, 0, grouped=True)


def test_batches_are_as_large_as_the_smallest_budget_allows():
    lengths = [10] * 40
    asked = defaultdict(list)

    def call(ranks):
        room = 100 if ranks.rank == 1 else 400

        def plan(tokens, batch_tokens):
            asked[ranks.rank].append((tokens, batch_tokens))
            grouped = ranks.rank != 2
            return replace(PLAN, batch_tokens=batch_tokens or room, grouped=grouped)

        return share_memory(plan, None, lengths, ranks)

    plans = together(3, call)
    assert [plan.batch_tokens for plan in plans] == [100, 100, 100]
    assert not any(plan.grouped for plan in plans)
    # Four batches of 100 tokens for three ranks: what each holds follows from what it is dealt.
    assert [asked[rank][-1] for rank in range(3)] == [(200, 100), (100, 100), (100, 100)]


def test_alone_the_memory_is_planned_once():
    asked = []

    def plan(tokens, batch_tokens):
        asked.append((tokens, batch_tokens))
        return replace(PLAN, batch_tokens=64)

    assert share_memory(plan, None, [30, 40], ALONE).batch_tokens == 64
    assert asked == [(70, None)]


class OnMachine(Threads):
    """The second of three ranks on one machine, as a launcher numbers them."""

    def __init__(self):
        super().__init__(1, 3, {}, None)


@pytest.fixture
def devices(monkeypatch):
    """Lets torch speak of so many GPUs; what is made the current one."""
    made = []

    def have(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", made.append)
        return made

    return have


def test_ranks_take_the_gpus_of_a_machine_in_order(devices):
    made = devices(3)
    device = own_device(torch.device("cuda"), OnMachine())
    assert device == torch.device("cuda", 1)
    assert made == [device]
    assert sharers(device, "cuda", OnMachine()) == Sharers(machine=3, device=1)


def test_more_ranks_than_gpus_are_refused_unless_one_is_named(devices):
    made = devices(2)
    with pytest.raises(UsageError, match=r"3 ranks .* 2 CUDA devices: .*--device cuda:0"):
        own_device(torch.device("cuda"), OnMachine())
    named = own_device(torch.device("cuda:0"), OnMachine())
    assert named == torch.device("cuda:0")
    assert sharers(named, "cuda:0", OnMachine()) == Sharers(machine=3, device=3)
    assert own_device(torch.device("cpu"), OnMachine()) == torch.device("cpu")
    assert sharers(torch.device("cpu"), "cpu", OnMachine()) == Sharers(machine=3, device=1)
    assert own_device(torch.device("cuda"), ALONE) == torch.device("cuda")
    assert made == []


def test_free_memory_is_divided_and_a_budget_is_not(monkeypatch):
    monkeypatch.setattr("reap_stream.resident.resident_nbytes", lambda: 0)
    alone, shared = available_nbytes(), available_nbytes(4)
    # Others take and give memory meanwhile.
    assert alone / 8 < shared < alone / 2
    demands = Demands(*(0 for _ in range(6)), per_token=1, num_experts=8, longest_row=1)
    options = {"hidden_nbytes": 0, "batch_tokens": 8, "device": torch.device("cpu")}
    plans = [
        plan_memory(demands, budget=budget, sharers=Sharers(machine=4), **options)
        for budget in (2**40, None)
    ]
    assert plans[0].budget == 2**40
    assert alone / 8 < plans[1].budget < alone / 2
