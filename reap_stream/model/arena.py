"""Memory for the bytes of experts, used again by one layer after the other."""

from __future__ import annotations

import torch


class Arena:
    """Memory that grows to what the largest layer takes.

    Args:
        device: where layers run; memory from which they are copied to a GPU is pinned.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        """At least `nbytes`, uint8; what was taken before is overwritten."""
        if self._memory.numel() < nbytes:
            # The old memory goes before the new comes.
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        return self._memory

    def release(self) -> None:
        """Gives the memory back; the next `take` gets new."""
        self._memory = torch.empty(0, dtype=torch.uint8)
