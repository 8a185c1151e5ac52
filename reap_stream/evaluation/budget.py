"""The memory of an evaluation: layers and heads do not run at the same time, so the larger counts.

layers   as in a calibration pass, with hidden states for every candidate
heads    hidden states for every candidate, the heads' weights, and slices of logits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from reap_stream.demands import Demands
from reap_stream.memory import RUNTIME_NBYTES, BudgetError, MemoryPlan, plan_memory
from reap_stream.model.lm_head import LmHead
from reap_stream.resident import enough_gib, gib, resident_nbytes

# More logits at a time than this make nothing faster.
_MOST_SLICE_NBYTES = 256 * 2**20
_LEAST_SLICE_NBYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class EvaluationMemory:
    """How the memory is divided.

    Attributes:
        layers: while layers run; its predicted peak is that of the whole evaluation.
        slice_nbytes: what a slice of logits and its temporaries may take.
    """

    layers: MemoryPlan
    slice_nbytes: int


def plan_evaluation(
    demands: Demands,
    *,
    hidden_nbytes: int,
    heads: Sequence[LmHead],
    budget: int | None,
    batch_tokens: int | None,
    device: torch.device,
) -> EvaluationMemory:
    """Divides the budget.

    Args:
        demands: what the layers take, the largest of all models.
        hidden_nbytes: hidden states of all candidates.
        heads: one for each model; those that are one object are held once.
        budget: host memory in bytes; None: most of what the machine has free.
        batch_tokens: as the user said, or None.
        device: where layers and heads run.

    Raises:
        BudgetError: the budget cannot hold it.
    """
    plan = plan_memory(
        demands,
        hidden_nbytes=hidden_nbytes,
        budget=budget,
        batch_tokens=batch_tokens,
        device=device,
    )
    on_device = device.type == "cuda"
    different = list({id(head): head for head in heads}.values())
    weights = sum(head.nbytes for head in different)
    loading = max(head.loading_nbytes - head.nbytes for head in different)
    # On a GPU only what is being loaded lies in host memory.
    base = resident_nbytes() + RUNTIME_NBYTES + (0 if on_device else weights)
    least = base + (loading if on_device else max(loading, _LEAST_SLICE_NBYTES))
    if least > plan.budget:
        message = (
            f"the memory budget is {gib(plan.budget)}, the heads of these models need at least "
            f"{enough_gib(least)}; raise --memory"
        )
        raise BudgetError(message, least)
    if not plan.spill and least + hidden_nbytes > plan.budget:
        plan = replace(plan, spill=True, peak_host=plan.peak_host - hidden_nbytes)
    held = base + (0 if plan.spill else hidden_nbytes)
    if on_device:
        room = _device_room(weights + loading, device)
        beside = loading
    else:
        room = min(_MOST_SLICE_NBYTES, plan.budget - held)
        beside = max(room, loading)
    return EvaluationMemory(replace(plan, peak_host=max(plan.peak_host, held + beside)), room)


def _device_room(heads_nbytes: int, device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    room = min(4 * _MOST_SLICE_NBYTES, (free - heads_nbytes) // 2)
    if room < _LEAST_SLICE_NBYTES:
        message = (
            f"{device} has {gib(free)} free, the heads of these models take {gib(heads_nbytes)} "
            "of it and slices of logits need room too; use --device cpu or fewer models"
        )
        raise BudgetError(message, 0)
    return room
