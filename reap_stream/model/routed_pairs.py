"""Which tokens each expert of a layer runs on, as the router chose."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RoutedPairs:
    """(token, expert) pairs sorted by expert, then by token; padding left out.

    Attributes:
        tokens: int64 [pairs] token numbers.
        slots: int64 [pairs] positions in the token's top-k.
        counts: pairs of each expert.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    counts: list[int]


def bucket(count: int) -> int:
    """`count` rounded up by at most a sixteenth, so that few different shapes occur.

    The CPU's matrix library makes and keeps a kernel for every shape it meets, and experts get a
    different number of tokens each time.
    """
    step = 1 << max(3, count.bit_length() - 5)
    return -(-count // step) * step


def sort_by_expert(top_k_index: torch.Tensor, valid: torch.Tensor, num_experts: int) -> RoutedPairs:
    """Sorts the router's choice [tokens, k] by expert; tokens where `valid` is False drop out."""
    top_k = top_k_index.shape[1]
    # Padding is sent to a number past the last expert, so that it is sorted to the end.
    flat = torch.where(valid[:, None], top_k_index, num_experts).reshape(-1)
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts].tolist()
    pairs = torch.argsort(flat, stable=True)[: sum(counts)]
    return RoutedPairs(torch.div(pairs, top_k, rounding_mode="floor"), pairs % top_k, counts)
