"""Every batch has one rank that runs it, and every tensor one that writes it."""

from __future__ import annotations

from collections import Counter, defaultdict

from hypothesis import given
from hypothesis import strategies as st

from reap_stream.calibration.batches import plan_batches
from reap_stream.calibration.dealing import deal, dealt_tokens
from reap_stream.checkpoint.division import divide
from reap_stream.checkpoint.layout import OutputPlan, OutputTensor, ShardPlan

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
