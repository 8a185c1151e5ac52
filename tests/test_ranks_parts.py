"""The pieces of a job of several ranks, each by itself: dealing, dividing, meeting, agreeing, adding."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reap_stream.calibration.batches import plan_batches
from reap_stream.calibration.dealing import deal, dealt_tokens
from reap_stream.checkpoint.division import divide
from reap_stream.checkpoint.layout import OutputPlan, OutputTensor, ShardPlan
from reap_stream.demands import Demands
from reap_stream.errors import UsageError
from reap_stream.memory import MemoryPlan, Sharers, plan_memory
from reap_stream.ranks.agreement import check_same
from reap_stream.ranks.base import ALONE, Ranks, say_of
from reap_stream.ranks.group import RankGroup
from reap_stream.ranks.launch import Place, launched_place, open_ranks
from reap_stream.ranks.peers import Peer, gone_peers, on_machines
from reap_stream.ranks.sums import sum_over_ranks
from reap_stream.resident import available_nbytes
from reap_stream.scoring.saliency import LayerStats
from reap_stream.sharing import own_device, share_memory, sharers
from tests.source_messages import is_printed

MEETING = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank, size, board, barrier):
        self.rank = self.local_rank = rank
        self.machines, self.local_size = (tuple(range(size)),), size
        self._board, self._barrier = board, barrier

    def gather(self, message):
        self._board[self.rank] = message
        self._barrier.wait(10)
        found = [self._board[rank] for rank in range(self.size)]
        self._barrier.wait(10)
        return found


def together(size, call):
    """What a function gives on each of several ranks."""
    board, barrier = {}, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        ranks = [Threads(rank, size, board, barrier) for rank in range(size)]
        return [future.result() for future in [pool.submit(call, own) for own in ranks]]


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


@given(lengths=LENGTHS, batch_tokens=st.integers(1, 200), size=st.integers(1, 7))
def test_every_batch_is_dealt_once_and_evenly(lengths, batch_tokens, size):
    batches = plan_batches(lengths, batch_tokens)
    shares = [deal(batches, rank, size) for rank in range(size)]
    dealt = [batch.row_indices for share in shares for batch in share]
    assert sorted(dealt) == sorted(batch.row_indices for batch in batches)
    loads = [sum(len(batch.rows) * batch.width for batch in share) for share in shares]
    largest = max(len(batch.rows) * batch.width for batch in batches)
    assert max(loads) - min(loads) <= largest
    assert sum(map(dealt_tokens, shares)) == sum(lengths)


@given(lengths=LENGTHS, batch_tokens=st.integers(1, 200), size=st.integers(1, 7))
def test_a_share_fills_its_own_storage_without_holes(lengths, batch_tokens, size):
    plain = {batch.row_indices: batch for batch in plan_batches(lengths, batch_tokens)}
    for rank in range(size):
        at = 0
        for batch in deal(list(plain.values()), rank, size):
            assert batch.start == at
            for row, length in zip(batch.rows, batch.lengths, strict=True):
                assert (row.start, row.stop) == (at, at + length)
                at = row.stop
            assert batch.stop == at
            same = plain[batch.row_indices]
            assert (batch.lengths, batch.width) == (same.lengths, same.width)


def test_one_rank_has_all_batches_as_they_are():
    batches = plan_batches([5, 9, 2, 9, 4], 12)
    assert deal(batches, 0, 1) == batches


@st.composite
def plans(draw):
    """Plans of tensors in shards, some of them computed together, in the order of their bytes."""
    shards = draw(st.integers(1, 6))
    tensors = {}
    places = sorted(draw(st.lists(st.integers(0, shards - 1), min_size=1, max_size=40)))
    recipe, left = None, 0
    for number, shard in enumerate(places):
        if left == 0:
            left = draw(st.integers(1, 3))
            recipe = object() if left > 1 else None
        left -= 1
        nbytes, layer = draw(st.integers(0, 1000)), draw(st.sampled_from([None, 0, 1]))
        name = f"tensor-{number}"
        tensors[name] = OutputTensor(
            name, "U8", (nbytes,), nbytes, shard, 0, name, layer=layer, recipe=recipe
        )
    files = tuple(ShardPlan(f"{number}", b"", 0) for number in range(shards))
    return OutputPlan(4, 8, files, tensors, 0)


MACHINES = st.sampled_from(
    [((0,),), ((0, 1),), ((0,), (1,)), ((0, 2), (1, 3, 4)), ((0,), (1,), (2,))]
)


@given(plan=plans(), machines=MACHINES)
def test_every_tensor_has_one_writer(plan, machines):
    shares = divide(plan, machines)
    assert shares.keys() == {rank for ranks in machines for rank in ranks}
    assert Counter(name for share in shares.values() for name in share) == Counter(
        list(plan.tensors)
    )


@given(plan=plans(), machines=MACHINES)
def test_a_shard_is_written_on_one_machine_and_a_recipe_by_one_rank(plan, machines):
    machine_of = {rank: number for number, ranks in enumerate(machines) for rank in ranks}
    writers, makers = defaultdict(set), defaultdict(set)
    for rank, share in divide(plan, machines).items():
        for name in share:
            writers[plan.tensors[name].shard].add(machine_of[rank])
            makers[id(plan.tensors[name].recipe)].add(rank)
    assert all(len(found) == 1 for found in writers.values())
    assert all(len(found) == 1 for key, found in makers.items() if key != id(None))


def test_a_layer_is_written_by_all_ranks():
    def tensor(number):
        return OutputTensor(f"{number}", "U8", (9,), 9, 0, 0, "", layer=number // 12, slot=number)

    tensors = {f"{number}": tensor(number) for number in range(36)}
    shares = divide(OutputPlan(4, 8, (ShardPlan("a", b"", 0),), tensors, 0), ((0, 1, 2),))
    for layer in range(3):
        names = {f"{number}" for number in range(12 * layer, 12 * layer + 12)}
        assert [len(names & share) for share in shares.values()] == [4, 4, 4]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        # A cluster's scheduler that says how many processes there are, but not which this is.
        {"WORLD_SIZE": "4"},
        {"RANK": "0"},
    ],
)
def test_a_process_alone_is_alone(environment):
    assert launched_place(environment) == Place()
    with open_ranks(Place()) as ranks:
        assert ranks is ALONE


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (MEETING, Place(1, 4)),
        ({**MEETING, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Place(1, 4, 1, 2)),
        ({**MEETING, "LOCAL_RANK": "1"}, Place(1, 4, 1)),
    ],
)
def test_a_launcher_says_which_rank_this_is(environment, place):
    assert launched_place(environment) == place


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"RANK": "4"}, "names rank 4 of 4"),
        ({"RANK": "one"}, "RANK is 'one' in the environment"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "on its machine 2 of 2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR not set: start with torchrun"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "MASTER_ADDR and MASTER_PORT not set"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(changes, pattern):
    with pytest.raises(UsageError, match=pattern):
        launched_place({**MEETING, **changes})


@pytest.mark.parametrize("patience", [0.0, -1.0, float("nan")])
def test_a_patience_that_is_none_is_refused(patience):
    with pytest.raises(UsageError, match="--rank-patience"), open_ranks(Place(0, 2), patience):
        pass


def test_launching_imports_no_torch():
    code = (
        "import sys; from reap_stream.ranks.launch import launched_place; launched_place(); "
        "import reap_stream.shared_job; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_alone_every_exchange_gives_what_was_given():
    assert ALONE.share({"a": [1, 2.5, None]}) == [{"a": [1, 2.5, None]}]
    assert ALONE.by_first(lambda: "done") == "done"
    assert ALONE.leads
    assert ALONE.on_this_machine == 1


def test_all_get_what_each_gives_and_what_the_first_did():
    taken = []

    def call(ranks):
        def step():
            taken.append(ranks.rank)
            return {"by": ranks.rank}

        return ranks.share(ranks.rank * 2), ranks.by_first(step), ranks.first([ranks.rank])

    assert together(3, call) == [([0, 2, 4], {"by": 0}, [0])] * 3
    assert taken == [0]


def some_stats(seed, tokens):
    rng = np.random.default_rng(seed)
    stats = LayerStats.zeros(2, 5)
    for name, array in stats.arrays().items():
        array[:] = tokens if name.endswith("tokens") else rng.normal(size=(2, 5)) ** 2 * 1e3
    stats.odd.tokens[:] = tokens // 2
    return stats


@pytest.mark.parametrize("size", [1, 2, 5])
def test_sums_of_all_ranks_are_the_same_bits_on_each(size):
    def call(ranks):
        return sum_over_ranks(ranks, some_stats(ranks.rank, ranks.rank), 10 + ranks.rank)

    found = together(size, call)
    for stats, lost in found:
        assert lost == sum(range(10, 10 + size))
        for name, array in stats.arrays().items():
            each = [some_stats(rank, rank).arrays()[name] for rank in range(size)]
            combine = np.max if name in {"norm_max", "output_max"} else np.sum
            np.testing.assert_allclose(array, combine(each, axis=0), rtol=1e-14, err_msg=name)
            np.testing.assert_array_equal(array, found[0][0].arrays()[name])


def test_what_differs_is_named_with_both_values():
    def call(ranks):
        facts = {"seed": 3, "data": "one" if ranks.rank < 2 else "two"}
        with pytest.raises(UsageError) as caught:
            check_same(ranks, facts)
        return str(caught.value)

    messages = set(together(3, call))
    assert len(messages) == 1
    assert 'data is "two" on rank 2 and "one" on rank 0' in messages.pop()
    together(3, lambda ranks: check_same(ranks, {"seed": 3, "list": (1, 2)}))


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


@pytest.mark.parametrize(
    ("place", "local"),
    [(Place(2, 4), (1, 2)), (Place(2, 4, 0, 1), (0, 1)), (Place(3, 4, 3), (3, 2))],
)
def test_what_the_launcher_says_of_a_machine_goes_before(place, local):
    group = RankGroup(place, timedelta(minutes=1))
    group._settle([Peer(host, 0) for host in "baab"])
    assert group.machines == ((0, 3), (1, 2))
    assert (group.local_rank, group.local_size) == local


def test_ranks_are_put_on_their_machines():
    peers = [Peer(host, number) for number, host in enumerate(("a", "b", "a", "c", "b"))]
    assert on_machines(peers) == ((0, 2), (1, 4), (3,))


def test_a_process_that_ended_is_found_among_others():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    here = Peer.here()
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        # Not waited for: it stays as its exit status alone, as under a launcher.
        peers = [here, Peer(here.host, living.pid), here._replace(process=ended.pid)]
        assert gone_peers(peers, 0, 20.0) == [2]
        ended.wait()
        assert gone_peers(peers, 0, 20.0) == [2]
        elsewhere = [here, Peer("another-machine", ended.pid), Peer(here.host, living.pid)]
        assert gone_peers(elsewhere, 0, 0.0) == []
    finally:
        living.communicate(b"\n")


def test_messages_are_json_that_keeps_numbers():
    assert together(2, lambda ranks: ranks.share(0.1 + ranks.rank))[0] == [0.1, 1.1]


def test_the_page_quotes_what_is_printed():
    page = (Path(__file__).parents[1] / "docs" / "ranks.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 5
    assert [text for text in quoted if not is_printed(text)] == []


@pytest.mark.parametrize(
    ("values", "text"), [([], ""), ([1], "1"), ([1, 2], "1 and 2"), ([1, 2, 3], "1, 2 and 3")]
)
def test_lists_are_said_as_people_do(values, text):
    assert say_of(values) == text
