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

import os
import resource
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from reap_stream.errors import UsageError
from reap_stream.model.architecture import Architecture
from reap_stream.model.feeds import LayerFeeds, feed_refs
from reap_stream.model.handover import Handover
from reap_stream.model.roles import Feed
from reap_stream.model.skeleton import KEPT_SHAPES
from reap_stream.model.slots import SlotLayout
from reap_stream.model.store import MOVING_SLOTS, decodes_by_expert
from reap_stream.model.transformers_api import get_tensor, parameter_dtype

_AVAILABLE_SHARE = 0.8
# Room a batch may take if nothing else is said: enough for products to run at full rate.
_BATCH_NBYTES = 768 * 2**20
_MAX_BATCH_TOKENS = 16384
# A batch is not cut below this to make room for experts: products would slow down more than
# reading experts again costs.
_MIN_BATCH_TOKENS = 1024
_STREAMING_SLOTS = 1 + MOVING_SLOTS
# What libraries come to hold once layers run, whatever the model: code pages, thread stacks, and
# oneDNN's compiled products, one for each count of rows. Measured: 60 to 115 MB.
_RUNTIME_NBYTES = 128 * 2**20
# Attention without a fused kernel: scores and copies of them live beside their softmax. Measured
# on gpt_oss in float32: 14 bytes a score, of which the masks take 2.
_SCORE_COPIES = 3
_SOFTMAX_NBYTES = 4
# A family with sliding windows has two masks.
_MASKS = 2


class BudgetError(UsageError):
    """A memory budget that cannot hold a pass; `least` is the least that could, in bytes."""

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True, slots=True)
class Demands:
    """What a model's layers take, in bytes.

    Attributes:
        dense: parameters of the largest layer but its routed experts, as they are computed with.
        largest_tensor: the largest dense tensor as it is on disk; it is held while it is decoded.
        slot: one expert as it is on disk.
        fused: experts tensors that can only be held whole, on disk and decoded.
        expert: one expert, decoded.
        decode: float32 temporaries of the largest dense tensor that is decoded on a device.
        per_token: what each token of a batch takes while a layer runs.
        num_experts: experts of a layer.
        longest_row: tokens of the longest row, which runs even where a batch is to hold fewer.
        writing: what it takes to write a weight in another format.
    """

    dense: int
    largest_tensor: int
    slot: int
    fused: int
    expert: int
    decode: int
    per_token: int
    num_experts: int
    longest_row: int
    writing: int = 0


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


def measure_demands(
    architecture: Architecture,
    feeds: list[LayerFeeds],
    dtype: torch.dtype,
    *,
    longest_row: int,
    handover: Handover | None = None,
) -> Demands:
    """What the layers of a model take when they compute in `dtype` on rows of `longest_row`."""
    dense, largest, decode = 0, 0, 0
    slot, fused = 0, 0
    for layer in feeds:
        dense = max(dense, sum(_decoded(architecture, f.target, dtype) for f in layer.dense))
        largest = max([largest, *(ref.nbytes for ref in feed_refs(layer.dense))])
        decode = max([decode, *(_decode_nbytes(architecture, f) for f in layer.dense)])
        own = {
            leaf: feed
            for leaf, feed in layer.experts.items()
            if len(feed.groups[0][1]) == architecture.num_experts
        }
        slot = max(slot, SlotLayout(own).nbytes if own else 0)
        whole = {leaf: feed for leaf, feed in layer.experts.items() if leaf not in own}
        raw = sum(ref.nbytes for ref in feed_refs(list(whole.values())))
        at_once = [f for leaf, f in whole.items() if _is_decoded_whole(f, layer.dims[leaf])]
        decoded = sum(_decoded(architecture, feed.target, dtype) for feed in at_once)
        fused = max(fused, raw + decoded)
    first = architecture.experts_paths[architecture.moe_layers[0]]
    expert = sum(
        parameter.numel() for parameter in architecture.model.get_submodule(first).parameters()
    )
    return Demands(
        dense=dense,
        largest_tensor=largest,
        slot=slot,
        fused=fused,
        expert=expert // architecture.num_experts * dtype.itemsize,
        decode=decode,
        per_token=_per_token(architecture, dtype, handover)
        + _scores(architecture, dtype, longest_row),
        num_experts=architecture.num_experts,
        longest_row=longest_row,
    )


def larger_demands(one: Demands, other: Demands) -> Demands:
    """What suffices for either of two sets of layers that run one after the other."""
    pairs = ((getattr(one, f.name), getattr(other, f.name)) for f in fields(Demands))
    return Demands(*(max(pair) for pair in pairs))


def mtp_demands(
    architecture: Architecture,
    feeds: list[LayerFeeds],
    dtype: torch.dtype,
    *,
    longest_row: int,
) -> Demands:
    """What next-token-prediction layers take: as decoder layers, and what they join."""
    demands = measure_demands(architecture, feeds, dtype, longest_row=longest_row)
    hidden = int(architecture.embedding.weight.shape[-1])
    # Embeddings of the tokens to come and the joined input stay while the block runs.
    return replace(demands, per_token=demands.per_token + 4 * hidden * dtype.itemsize)


def plan_memory(
    demands: Demands,
    *,
    hidden_nbytes: int,
    budget: int | None,
    batch_tokens: int | None,
    device: torch.device,
) -> MemoryPlan:
    """Divides the budget: first what must be, then hidden states, then experts, then the batch.

    Args:
        demands: what the layers take.
        hidden_nbytes: all hidden states.
        budget: host memory in bytes; None: most of what the machine has free.
        batch_tokens: as the user said, or None.
        device: where layers run.

    Raises:
        BudgetError: the budget cannot hold even a few experts; it gives the least that could.
    """
    on_device = device.type == "cuda"
    allowed = available_nbytes() if budget is None else budget
    base = resident_nbytes() + _RUNTIME_NBYTES + demands.fused + demands.largest_tensor
    base += demands.writing
    if not on_device:
        base += demands.dense + demands.expert
    for_batch = torch.cuda.mem_get_info(device)[0] // 8 if on_device else _BATCH_NBYTES
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
            f"{gib(least + working)} with batches of {together} tokens; raise --memory"
            + _smaller_batches(tokens, batch_tokens, demands.longest_row)
        )
        raise BudgetError(message, least + working)
    room = allowed - least - working
    spill = hidden_nbytes > room // 2
    room -= 0 if spill else hidden_nbytes
    slots = min(demands.num_experts, _STREAMING_SLOTS)
    slots += min(demands.num_experts - slots, room // demands.slot) if demands.slot else 0
    peak = least + working + (0 if spill else hidden_nbytes)
    peak += (slots - min(demands.num_experts, _STREAMING_SLOTS)) * demands.slot
    grouped, peak_device = _plan_device(demands, together, device) if on_device else (False, 0)
    return MemoryPlan(allowed, tokens, slots, spill, peak, peak_device, grouped, hidden_nbytes)


def _smaller_batches(tokens: int, asked: int | None, longest_row: int) -> str:
    if longest_row > tokens:
        return " or lower --sequence-length"
    return "" if asked is None else " or lower --batch-tokens"


def _plan_device(demands: Demands, tokens: int, device: torch.device) -> tuple[bool, int]:
    """Whether all experts of a layer fit on the device decoded, and the peak either way."""
    free, _ = torch.cuda.mem_get_info(device)
    base = demands.dense + demands.largest_tensor + demands.decode + demands.fused
    base += tokens * demands.per_token
    # Grouped products hold the outputs of all routed tokens at once.
    everything = base + demands.expert * demands.num_experts + 4 * tokens * demands.per_token
    if everything < free * _AVAILABLE_SHARE:
        return True, everything
    return False, base + 3 * demands.expert


def _decoded(architecture: Architecture, target: str, dtype: torch.dtype) -> int:
    tensor = get_tensor(architecture.model, target)
    held = parameter_dtype(architecture.model, target, dtype)
    return tensor.numel() * held.itemsize


def _decode_nbytes(architecture: Architecture, feed: Any) -> int:
    """Bytes of the two float32 matrices, values and scales, that decoding on a device takes."""
    if all(weight.is_plain for _, weights in feed.groups for weight in weights):
        return 0
    return 2 * 4 * get_tensor(architecture.model, feed.target).numel()


def _is_decoded_whole(feed: Feed, dim: int) -> bool:
    """Whether the experts of a tensor that holds them all can only be decoded together."""
    plain = all(weight.is_plain for _, weights in feed.groups for weight in weights)
    used_as_it_is = feed.groups[0][0] is None and plain
    return not used_as_it_is and not decodes_by_expert(feed, dim)


def _per_token(
    architecture: Architecture, dtype: torch.dtype, handover: Handover | None
) -> int:  # fmt: skip
    """Bytes a token takes while a layer runs: its widest intermediates and the running sums.

    Measured on GLM-4.6's widths the peak is four to five of the widest intermediates (queries,
    rotated queries, keys and attention outputs, or gate, up and their product).
    """
    model = architecture.model
    widest = max(
        int(max(parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
        and architecture.layer_of(name) is not None
        and name not in architecture.sliced
    )
    hidden = int(architecture.embedding.weight.shape[-1])
    between = hidden if handover is None else max(hidden, handover.token_elements)
    carried = 0 if handover is None else handover.carried_nbytes
    return (5 * widest + 6 * between) * dtype.itemsize + 4 * between + 2 * carried


def _scores(architecture: Architecture, dtype: torch.dtype, longest_row: int) -> int:
    """Bytes a token takes in attention matrices and masks; 0 where a kernel never forms them."""
    config = architecture.model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) != "eager":
        return 0
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    score = _SOFTMAX_NBYTES + _SCORE_COPIES * dtype.itemsize
    masks = _MASKS * (KEPT_SHAPES + 1) * dtype.itemsize
    return longest_row * (heads * score + masks)


def resident_nbytes() -> int:
    """Resident memory of this process now, in bytes; the peak where the system does not say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_resident_nbytes()
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_nbytes() -> int:
    """Largest resident memory this process ever had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            # Not `ru_maxrss`: that begins with the memory of the process that started this one.
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_nbytes() -> int:
    """Host memory this process may come to use: most of what is free, within its control group."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists():
        text = limit.read_text(encoding="ascii").strip()
        free = min(free, int(text)) if text.isdigit() else free
    return int(free * _AVAILABLE_SHARE) + resident_nbytes()


def peak_device_nbytes() -> int:
    """Largest memory this process ever had allocated on one device, in bytes; 0 without one."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # torch does not type it
        return 0
    devices = range(torch.cuda.device_count())
    return max((int(torch.cuda.max_memory_allocated(device)) for device in devices), default=0)


def gib(nbytes: int) -> str:
    """A number of bytes for people: ``3.25 GiB``."""
    return f"{nbytes / 2**30:.2f} GiB"
