"""How one expert's bytes lie in a slot of memory, and how they become its parameters.

Tensors that transformers joins into one parameter lie side by side, so gate and up projections that
lie apart on disk are one matrix in memory:

    slot:  | gate.weight | up.weight | gate.scale | up.scale | down.weight | down.scale |
           '----- gate_up_proj -----'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats import Weight
from reap_stream.model.loading import decode, typed
from reap_stream.model.roles import Feed
from reap_stream.model.transformers_api import KeyMap

_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one tensor of an expert lies in its slot."""

    leaf: str
    group: int
    role: str
    offset: int
    nbytes: int


class SlotLayout:
    """Order and offsets of one expert's tensors in a slot.

    Args:
        feeds: experts parameter leaf name → what it is made of, a tensor an expert.
    """

    def __init__(self, feeds: Mapping[str, Feed]) -> None:
        self.feeds = dict(feeds)
        self.pieces: list[Piece] = []
        offset = 0
        for leaf, feed in self.feeds.items():
            for role in feed.groups[0][1][0].parts:
                offset = -(-offset // _ALIGN) * _ALIGN
                for group, (_, weights) in enumerate(feed.groups):
                    nbytes = weights[0].parts[role].nbytes
                    self.pieces.append(Piece(leaf, group, role, offset, nbytes))
                    offset += nbytes
        self.nbytes = -(-offset // _ALIGN) * _ALIGN

    def ref(self, piece: Piece, expert: int) -> TensorRef:
        """The tensor of `expert` that lies at `piece`."""
        return self.feeds[piece.leaf].groups[piece.group][1][expert].parts[piece.role]


class SlotDecoder:
    """Makes an expert's parameters from the bytes of a slot.

    Args:
        layout: how the bytes lie.
        dims: experts parameter leaf name → dimension of the experts in the parameter.
        keys: the checkpoint's key mapping.
    """

    def __init__(self, layout: SlotLayout, dims: Mapping[str, int], keys: KeyMap) -> None:
        self._layout = layout
        self._dims = dims
        self._keys = keys
        self._scratch: dict[str, torch.Tensor] = {}

    def parameter(
        self,
        leaf: str,
        expert: int,
        slot: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """One parameter of an expert, without the expert dimension.

        Args:
            leaf: the parameter's leaf name.
            expert: number of the expert, whose scales and shapes hold.
            slot: uint8, the bytes of the slot.
            dtype: compute dtype.
            device: where it goes.

        Returns:
            The parameter; a view of the slot or of a buffer that the next call reuses.
        """
        feed = self._layout.feeds[leaf]
        weights = [group[expert] for _, group in feed.groups]
        pattern = feed.groups[0][0]
        raws = [self._raw(slot, leaf, group) for group in range(len(weights))]
        if pattern is None or not self._keys.stacks_rows(pattern):
            groups = [
                (p, [decode(weight, raw, dtype, device)])
                for (p, _), weight, raw in zip(feed.groups, weights, raws, strict=True)
            ]
            dim = self._dims[leaf]
            made = self._keys.convert(feed.target, groups, one_along=dim)
            return made[feed.target].select(dim, 0)
        plain = all(weight.is_plain for weight in weights)
        if plain and len({weight.parts["weight"].dtype for weight in weights}) == 1:
            return _joined_view(weights, raws).to(device=device, dtype=dtype)
        return self._decode_rows(leaf, weights, raws, dtype, device)

    def _raw(self, slot: torch.Tensor, leaf: str, group: int) -> dict[str, torch.Tensor]:
        return {
            piece.role: slot[piece.offset : piece.offset + piece.nbytes]
            for piece in self._layout.pieces
            if piece.leaf == leaf and piece.group == group
        }

    def _decode_rows(
        self,
        leaf: str,
        weights: list[Weight],
        raws: list[dict[str, torch.Tensor]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        shape = (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])
        out = self._scratch.get(leaf)
        if out is None or out.shape != shape or out.dtype != dtype or out.device != device:
            out = self._scratch[leaf] = torch.empty(shape, dtype=dtype, device=device)
        row = 0
        for weight, raw in zip(weights, raws, strict=True):
            parts = {role: typed(ref, raw[role]).to(device) for role, ref in weight.parts.items()}
            weight.format.decode(weight, parts, out[row : row + weight.shape[0]])
            row += weight.shape[0]
        return out


def _joined_view(weights: list[Weight], raws: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Plain weights that lie side by side are one matrix already."""
    nbytes = sum(len(raw["weight"]) for raw in raws)
    joined = raws[0]["weight"].as_strided((nbytes,), (1,))
    ref = weights[0].parts["weight"]
    rows = sum(weight.shape[0] for weight in weights)
    return typed(
        TensorRef(ref.name, ref.file, ref.dtype, (rows, *ref.shape[1:]), 0, nbytes), joined
    )
