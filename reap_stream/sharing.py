"""How the ranks on one machine share its devices and its memory.

Batches are planned once for all ranks: as many tokens as every rank has room for. So a rank's batches
are those that one process would run, and only what is held beside them is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from reap_stream.calibration.batches import plan_batches
from reap_stream.calibration.dealing import deal, dealt_tokens
from reap_stream.errors import UsageError
from reap_stream.memory import MemoryPlan, Sharers
from reap_stream.ranks.base import Ranks

MemoryPlanner = Callable[[int, "int | None"], MemoryPlan]


def own_device(device: torch.device, ranks: Ranks) -> torch.device:
    """The device of this rank, where the user named none of several.

    Args:
        device: as the user said.
        ranks: the ranks.

    Raises:
        UsageError: fewer devices than ranks.
    """
    if str(device) != "cuda" or ranks.size == 1:
        return device
    count = torch.cuda.device_count()
    if ranks.local_size > count:
        message = (
            f"{ranks.local_size} ranks were started on a machine that shows them {count} CUDA "
            "devices: start as many ranks as there are devices, or name one for all of them with "
            "--device cuda:0 or --device cpu"
        )
        raise UsageError(message)
    own = torch.device("cuda", ranks.local_rank)
    # Otherwise every rank would also take memory of the first device.
    torch.cuda.set_device(own)
    return own


def sharers(device: torch.device, asked: str, ranks: Ranks) -> Sharers:
    """How many ranks share this one's machine, and its device.

    Args:
        device: where this rank's layers run.
        asked: the device as the user said.
        ranks: the ranks.
    """
    here = ranks.on_this_machine
    named = device.type == "cuda" and ":" in asked
    return Sharers(here, here if named else 1)


def share_memory(
    plan: MemoryPlanner, batch_tokens: int | None, lengths: Sequence[int], ranks: Ranks
) -> MemoryPlan:
    """Divides the memory of this rank, for batches that all ranks have room for.

    Args:
        plan: gives the memory of a pass of so many tokens, in batches of so many.
        batch_tokens: as the user said, or None.
        lengths: tokens of each row of all ranks.
        ranks: the ranks.

    Raises:
        BudgetError: a rank's budget cannot hold its part.
    """
    expected = -(-sum(lengths) // ranks.size)
    memory = plan(expected, batch_tokens)
    agreed = min(ranks.share(memory.batch_tokens))
    own = dealt_tokens(deal(plan_batches(lengths, agreed), ranks.rank, ranks.size))
    if (agreed, own) != (memory.batch_tokens, expected):
        memory = plan(own, agreed)
    return replace(memory, grouped=all(ranks.share(memory.grouped)))
