"""Packers of GPTQ and AWQ, written from the formats' definitions."""

from __future__ import annotations

import torch

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_gptq(
    codes: torch.Tensor,
    zeros: torch.Tensor,
    scale: torch.Tensor,
    order: torch.Tensor,
    bits: int = 4,
    offset: int = 1,
) -> dict[str, torch.Tensor]:
    """The tensors of a weight.

    Args:
        codes: int64 [N, K].
        zeros: int64 [N, G].
        scale: [N, G].
        order: int32 [K], the group of each column.
        bits: bits of a code.
        offset: what the format takes off each zero point, with borrow.
    """
    return {
        "qweight": _words(codes.t(), 0, bits),
        "qzeros": _words(zeros.t(), 1, bits) - offset * sum(1 << at for at in range(0, 32, bits)),
        "scales": scale.t().contiguous(),
        "g_idx": order,
    }


def pack_awq(
    codes: torch.Tensor, zeros: torch.Tensor, scale: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The tensors of a weight: codes int64 [N, K], zeros int64 [N, G], scale [N, G]."""

    def ordered(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(1, (-1, 8))[:, :, list(_AWQ_ORDER)].flatten(1)

    return {
        "qweight": _words(ordered(codes.t()), 1, 4),
        "qzeros": _words(ordered(zeros.t()), 1, 4),
        "scales": scale.t().contiguous(),
    }


def _words(values: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """Neighbours along `dim` in words, lowest bits first."""
    grouped = values.unflatten(dim, (-1, 32 // bits)).movedim(dim + 1, -1)
    shifts = torch.arange(32 // bits) * bits
    return (grouped << shifts).sum(-1).to(torch.int32)
