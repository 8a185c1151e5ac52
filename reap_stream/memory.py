"""How much memory a pass takes, decided before it starts and reported when it ends.

    peak host memory =  what the process holds before the pass, and libraries come to hold in it
                      + dense part of the largest layer, decoded
                      + experts held as bytes (all of a layer, or as many as the budget allows)
                      + one expert, decoded
                      + hidden states and what else layers hand on (or a file)
                      + what a batch needs while it runs

Nothing in it grows with the number of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reap_stream.demands import Demands
from reap_stream.errors import UsageError
from reap_stream.model.store import MOVING_SLOTS
from reap_stream.resident import (
    USABLE_SHARE,
    available_nbytes,
    enough_gib,
    gib,
    resident_nbytes,
)

# Room a batch may take if nothing else is said: enough for products to run at full rate.
_BATCH_NBYTES = 768 * 2**20
_MAX_BATCH_TOKENS = 16384
# A batch is not cut below this to make room for experts: products would slow down more than
# reading experts again costs.
_MIN_BATCH_TOKENS = 1024
_STREAMING_SLOTS = 1 + MOVING_SLOTS
# What libraries come to hold once layers run, whatever the model: code pages, thread stacks, and
# oneDNN's compiled products, one for each count of rows. Measured: 60 to 115 MB.
RUNTIME_NBYTES = 128 * 2**20


class BudgetError(UsageError):
    """A memory budget that cannot hold a pass; `least` is the least that could, in bytes."""

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True, slots=True)
class Sharers:
    """Processes of one job that divide what is free, this one counted.

    Attributes:
        machine: those on its machine.
        device: those on its device.
    """

    machine: int = 1
    device: int = 1


_NO_SHARERS = Sharers()


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What was decided.

    Attributes:
        budget: host memory that may be used, in bytes.
        batch_tokens: tokens that run together; a longer row runs alone.
        expert_slots: experts of a layer held at a time.
        spill: hidden states go to a file.
        peak_host: predicted peak of resident memory.
        peak_device: predicted peak of device memory; 0 on the CPU.
        grouped: experts run in grouped matrix products.
        hidden_nbytes: all hidden states and what else layers hand on.
    """

    budget: int
    batch_tokens: int
    expert_slots: int
    spill: bool
    peak_host: int
    peak_device: int
    grouped: bool = False
    hidden_nbytes: int = 0


def plan_memory(
    demands: Demands,
    *,
    hidden_nbytes: int,
    budget: int | None,
    batch_tokens: int | None,
    device: torch.device,
    sharers: Sharers = _NO_SHARERS,
) -> MemoryPlan:
    """Divides the budget: first what must be, then hidden states, then experts, then the batch.

    Args:
        demands: what the layers take.
        hidden_nbytes: all hidden states.
        budget: host memory in bytes; None: most of what the machine has free.
        batch_tokens: as the user said, or None.
        device: where layers run.
        sharers: who else takes of what is free.

    Raises:
        BudgetError: the budget cannot hold even a few experts; it gives the least that could.
    """
    on_device = device.type == "cuda"
    allowed = available_nbytes(sharers.machine) if budget is None else budget
    free = torch.cuda.mem_get_info(device)[0] // sharers.device if on_device else 0
    base = resident_nbytes() + RUNTIME_NBYTES + demands.fused + demands.largest_tensor
    base += demands.writing
    if not on_device:
        base += demands.dense + demands.expert
    for_batch = free // 8 if on_device else _BATCH_NBYTES
    tokens = batch_tokens or max(1, min(_MAX_BATCH_TOKENS, for_batch // demands.per_token))
    least = base + min(demands.num_experts, _STREAMING_SLOTS) * demands.slot
    if batch_tokens is None and not on_device:
        spare = allowed - least
        tokens = max(min(tokens, _MIN_BATCH_TOKENS), min(tokens, spare // 3 // demands.per_token))
    together = max(tokens, demands.longest_row)
    working = 0 if on_device else together * demands.per_token
    if least + working > allowed:
        message = (
            f"the memory budget is {gib(allowed)}, this model needs at least "
            f"{enough_gib(least + working)} with batches of {together} tokens; raise --memory"
            + _smaller_batches(tokens, batch_tokens, demands.longest_row)
        )
        raise BudgetError(message, least + working)
    room = allowed - least - working
    spill = hidden_nbytes > room // 2
    room -= 0 if spill else hidden_nbytes
    slots = min(demands.num_experts, _STREAMING_SLOTS)
    more = demands.num_experts - slots
    # Experts of one tensor have no slots: they are held whole.
    slots += min(more, room // demands.slot) if demands.slot else more
    peak = least + working + (0 if spill else hidden_nbytes)
    peak += (slots - min(demands.num_experts, _STREAMING_SLOTS)) * demands.slot
    grouped, peak_device = _plan_device(demands, together, free) if on_device else (False, 0)
    return MemoryPlan(allowed, tokens, slots, spill, peak, peak_device, grouped, hidden_nbytes)


def _smaller_batches(tokens: int, asked: int | None, longest_row: int) -> str:
    if longest_row > tokens:
        return " or lower --sequence-length"
    return "" if asked is None else " or lower --batch-tokens"


def _plan_device(demands: Demands, tokens: int, free: int) -> tuple[bool, int]:
    """Whether all experts of a layer fit into the device's free bytes, and the peak either way."""
    base = demands.dense + demands.largest_tensor + demands.decode + demands.fused
    base += tokens * demands.per_token
    # Grouped products hold the outputs of all routed tokens at once.
    everything = base + demands.expert * demands.num_experts + demands.twin
    everything += 4 * tokens * demands.per_token
    if everything < free * USABLE_SHARE:
        return True, everything
    return False, base + 3 * demands.expert
