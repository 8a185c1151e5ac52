"""How much memory the layers of a model take, known from their shapes before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from reap_stream.model.architecture import Architecture
from reap_stream.model.feeds import LayerFeeds, feed_refs
from reap_stream.model.handover import Handover
from reap_stream.model.roles import Feed
from reap_stream.model.skeleton import KEPT_SHAPES
from reap_stream.model.slots import SlotLayout
from reap_stream.model.store import decodes_by_expert
from reap_stream.model.transformers_api import get_tensor, parameter_dtype

# Attention without a fused kernel: scores and copies of them live beside their softmax. Measured
# on gpt_oss in float32: 14 bytes a score, of which the masks take 2.
_SCORE_COPIES = 3
_SOFTMAX_NBYTES = 4
# A family with sliding windows has two masks.
_MASKS = 2


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
        twin: kept experts of a pruned layer, decoded, that stand beside the whole layer's on a GPU.
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
    twin: int = 0


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
