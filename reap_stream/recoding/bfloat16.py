"""``--weights bf16``: every weight as the bfloat16 numbers it stands for, for converters to GGUF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from reap_stream.checkpoint.recipes import Bytes
from reap_stream.formats import Weight
from reap_stream.recoding.base import Part


class BFloat16:
    """Plain bfloat16."""

    name = "bf16"
    rows = 1
    exact = torch.bfloat16

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """One tensor."""
        return (Part("", "BF16", tuple(shape)),)

    def holds(self, weight: Weight) -> bool:
        """Plain bfloat16."""
        return weight.is_plain and weight.parts["weight"].dtype == "BF16"

    def encode(self, values: torch.Tensor, where: str) -> tuple[Bytes, ...]:
        """Rounds to nearest even."""
        del where
        rounded = values.to(torch.bfloat16).contiguous()
        return (rounded.view(torch.uint8).reshape(-1).numpy(),)

    def quantization_config(self, ignored: Sequence[str]) -> dict[str, Any] | None:
        """Nothing is quantised."""
        del ignored
        return None
