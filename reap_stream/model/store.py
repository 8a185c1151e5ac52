"""One layer's routed experts as bytes in memory: all of them, or as many as the budget allows.

The bytes of an expert lie in one slot of a reused arena; see `reap_stream.model.slots`. Slots hold
the checkpoint's own bytes: what the forward decodes is what the writer writes.

Tensors that hold all experts at once are held whole, as they are on disk; where their experts can
be told apart in the bytes, one expert at a time is decoded.

With fewer slots than experts, the first experts stay and the last two slots are refilled in turn:
the next expert's bytes are read while one expert computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from reap_stream.checkpoint.reader import Reader
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats import Weight, member
from reap_stream.model.loading import decode
from reap_stream.model.roles import Feed
from reap_stream.model.slots import SlotDecoder, SlotLayout
from reap_stream.model.transformers_api import KeyMap

MOVING_SLOTS = 2

Bytes = np.ndarray[Any, Any]
Requests = list[tuple[TensorRef, int, int, Bytes]]


def decodes_by_expert(feed: Feed, dim: int) -> bool:
    """Whether the experts of one encoded tensor can be decoded one by one.

    They can where the parameter is the tensor's values as they are, and the experts lie along its
    first dimension in all parts. (Plain tensors need no decoding: they are used where they lie.)
    """
    (pattern, (weight, *_)), *others = feed.groups
    counts = {ref.shape[:1] for ref in weight.parts.values()}
    apart = dim == 0 and counts == {weight.shape[:1]}
    return pattern is None and not others and apart and not weight.is_plain


class ExpertStore:
    """Gives the parameters of one expert at a time, decoded to the compute dtype.

    Args:
        feeds: experts parameter leaf name → what it is made of.
        dims: leaf name → dimension of the experts in the parameter.
        num_experts: experts of the layer.
        keys: the checkpoint's key mapping.
        reader: reads the bytes.
        each: leaf name → entries of one expert along that dimension, where not one.
    """

    def __init__(
        self,
        feeds: Mapping[str, Feed],
        dims: Mapping[str, int],
        num_experts: int,
        keys: KeyMap,
        reader: Reader,
        *,
        each: Mapping[str, int] | None = None,
    ) -> None:
        own = {leaf: f for leaf, f in feeds.items() if len(f.groups[0][1]) == num_experts}
        self.layout = SlotLayout(own)
        self.num_experts = num_experts
        self._fused = {leaf: feed for leaf, feed in feeds.items() if leaf not in own}
        self._dims = dict(dims)
        self._each = dict(each or {})
        self._decoder = SlotDecoder(self.layout, self._dims, keys)
        self._keys = keys
        self._reader = reader
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._resident = 0
        self._moving: dict[int, tuple[int, Future[None]]] = {}
        self._turn = 0
        self._pool: ThreadPoolExecutor | None = None
        self._places: dict[str, tuple[int, int]] = {}
        self._whole: dict[str, torch.Tensor] = {}
        self._converted: dict[str, torch.Tensor] = {}
        self._stack: dict[str, torch.Tensor] = {}
        self._stack_is_current = False

    @property
    def fused_nbytes(self) -> int:
        """Bytes of tensors that hold all experts at once; they are held whole."""
        groups = (group for feed in self._fused.values() for group in feed.groups)
        return sum(weight.nbytes for _, weights in groups for weight in weights)

    def open(self, arena: torch.Tensor, slots: int) -> None:
        """Reads the experts that stay in memory: all of them where `slots` suffices.

        Args:
            arena: uint8, at least `slots` × `layout.nbytes` long, reused between layers.
            slots: experts held at a time; more than `MOVING_SLOTS` unless it is all of them.
        """
        everything = slots >= self.num_experts
        self._arena = arena
        self._resident = self.num_experts if everything else slots - MOVING_SLOTS
        for feed in self._fused.values():
            for _, weights in feed.groups:
                for ref in weights[0].parts.values():
                    self._whole[ref.name] = torch.from_numpy(self._reader.read(ref))
        if not self.layout.pieces:
            return
        self._reader.read_into([r for e in range(self._resident) for r in self._requests(e, e)])
        for expert in range(self._resident):
            for piece in self.layout.pieces:
                start = expert * self.layout.nbytes + piece.offset
                self._places[self.layout.ref(piece, expert).name] = (start, piece.nbytes)

    def close(self) -> None:
        """Forgets the bytes; the arena stays the caller's."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        for mapping in (self._moving, self._places, self._whole, self._converted, self._stack):
            mapping.clear()
        self._stack_is_current = False
        self._arena = torch.empty(0, dtype=torch.uint8)

    def resident(self, ref: TensorRef) -> Bytes | None:
        """The bytes of a tensor if they stay in memory, else None."""
        if ref.name in self._whole:
            whole: Bytes = self._whole[ref.name].numpy()
            return whole
        if ref.name not in self._places:
            return None
        start, nbytes = self._places[ref.name]
        piece: Bytes = self._arena[start : start + nbytes].numpy()
        return piece

    def parameters(
        self, expert: int, dtype: torch.dtype, device: torch.device, following: int | None = None
    ) -> dict[str, torch.Tensor]:
        """The parameters of one expert.

        Args:
            expert: number of the expert.
            dtype: compute dtype.
            device: where they go.
            following: the expert that will be asked for next, to be read meanwhile.

        Returns:
            Leaf name → tensor without the expert dimension, valid until the next call.
        """
        slot = self._bring(expert) if self.layout.pieces else 0
        if following is not None and self.layout.pieces and not self._held(following):
            self._fetch(following, in_use=slot)
        base = slot * self.layout.nbytes
        raw = self._arena[base : base + self.layout.nbytes]
        made = {
            leaf: self._decoder.parameter(leaf, expert, raw, dtype, device)
            for leaf in self.layout.feeds
        }
        for leaf, feed in self._fused.items():
            if decodes_by_expert(feed, self._dims[leaf]):
                made[leaf] = self._decode_member(feed.groups[0][1][0], expert, dtype, device)
            elif leaf not in self._converted:
                self._convert_fused(leaf, dtype, device)
        for leaf, tensor in self._converted.items():
            dim, each = self._dims[leaf], self._each.get(leaf, 1)
            own = tensor.narrow(dim, expert * each, each)
            made[leaf] = own if each > 1 else own.squeeze(dim)
        return made

    def stacked(self, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """The parameters of all experts, [experts, ...] each, decoded once a layer."""
        if not self._stack_is_current:
            for expert in range(self.num_experts):
                following = expert + 1 if expert + 1 < self.num_experts else None
                for leaf, tensor in self.parameters(expert, dtype, device, following).items():
                    stack = self._stack.get(leaf)
                    if stack is None:
                        shape = (self.num_experts, *tensor.shape)
                        stack = torch.empty(shape, dtype=dtype, device=device)
                        self._stack[leaf] = stack
                    stack[expert].copy_(tensor)
            self._stack_is_current = True
        return self._stack

    def _held(self, expert: int) -> bool:
        return expert < self._resident or expert in self._moving

    def _bring(self, expert: int) -> int:
        """Waits until the expert's bytes are in memory; its slot."""
        if expert < self._resident:
            return expert
        if expert not in self._moving:
            self._fetch(expert)
        slot, future = self._moving[expert]
        future.result()
        return slot

    def _fetch(self, expert: int, in_use: int | None = None) -> None:
        """Begins to read an expert into the moving slot that was refilled longest ago.

        An expert found in a moving slot may be the next to make way: `in_use` spares its slot.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reap-experts")
        if self._resident + self._turn == in_use:
            self._turn = (self._turn + 1) % MOVING_SLOTS
        slot = self._resident + self._turn
        self._turn = (self._turn + 1) % MOVING_SLOTS
        for number in [n for n, (taken, _) in self._moving.items() if taken == slot]:
            del self._moving[number]
        requests = self._requests(expert, slot)
        self._moving[expert] = (slot, self._pool.submit(self._reader.read_into, requests))

    def _requests(self, expert: int, slot: int) -> Requests:
        requests = []
        for piece in self.layout.pieces:
            start = slot * self.layout.nbytes + piece.offset
            target = self._arena[start : start + piece.nbytes].numpy()
            requests.append((self.layout.ref(piece, expert), 0, piece.nbytes, target))
        return requests

    def _decode_member(
        self, weight: Weight, expert: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        own = member(weight, expert)
        raw = {}
        for role, ref in own.parts.items():
            start = expert * ref.nbytes
            raw[role] = self._whole[ref.name][start : start + ref.nbytes]
        return decode(own, raw, dtype, device)

    def _convert_fused(self, leaf: str, dtype: torch.dtype, device: torch.device) -> None:
        feed = self._fused[leaf]
        groups = []
        for pattern, weights in feed.groups:
            raw = {role: self._whole[ref.name] for role, ref in weights[0].parts.items()}
            groups.append((pattern, [decode(weights[0], raw, dtype, device)]))
        for name, tensor in self._keys.convert(feed.target, groups).items():
            self._converted[name.rpartition(".")[2]] = tensor
