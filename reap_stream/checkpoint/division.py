"""Which rank writes which tensors of a pruned checkpoint.

Every rank has each layer's bytes in memory, and all go on to the next layer together. So each layer's
tensors are divided among the ranks: whole layers in turns would let all others wait for one.

A shard is written by the ranks of one machine only. Network file systems keep pages of a file on
each machine, and two machines that write to one page may undo each other's bytes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from reap_stream.checkpoint.layout import OutputPlan, OutputTensor


def divide(plan: OutputPlan, machines: Sequence[Sequence[int]]) -> dict[int, frozenset[str]]:
    """The names of the tensors that each rank writes.

    Each tensor goes to one rank of its shard's machine: to the one with the fewest bytes of the
    layer by then. Tensors that one recipe computes stay together.

    Args:
        plan: the checkpoint.
        machines: the ranks of each machine.
    """
    shards = _shard_machines(plan, len(machines))
    loads: dict[tuple[int | None, int], int] = defaultdict(int)
    names: dict[int, set[str]] = {rank: set() for ranks in machines for rank in ranks}
    for unit in _units(plan.tensors.values()):
        layer, ranks = unit[0].layer, machines[shards[unit[0].shard]]
        taker = min(ranks, key=lambda rank: (loads[layer, rank], rank))
        loads[layer, taker] += sum(out.nbytes for out in unit)
        names[taker].update(out.name for out in unit)
    return {rank: frozenset(found) for rank, found in names.items()}


def _shard_machines(plan: OutputPlan, machines: int) -> list[int]:
    """The machine of each shard: in turns, but shards that one recipe fills have one."""
    joined = {
        shard
        for unit in _units(plan.tensors.values())
        for shard in range(unit[0].shard + 1, max(out.shard for out in unit) + 1)
    }
    turn = -1
    found = []
    for shard in range(len(plan.shards)):
        turn += shard not in joined
        found.append(turn % machines)
    return found


def _units(outs: Iterable[OutputTensor]) -> list[list[OutputTensor]]:
    """What cannot be divided: a tensor, or all that one recipe computes."""
    units: dict[int | str, list[OutputTensor]] = {}
    for out in outs:
        key = out.name if out.recipe is None else id(out.recipe)
        units.setdefault(key, []).append(out)
    return list(units.values())
