"""Weights of a format that no decoder knows: they can be copied, not computed with."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.errors import ReapStreamError
from reap_stream.formats.base import Weight

_SHOWN = 3


class Opaque:
    """Whatever lies where a weight should."""

    name = "unknown"

    def claim(self, name: str, tensors: Mapping[str, TensorRef]) -> Weight | None:
        """Claims nothing: that a weight belongs there only the model can tell."""
        del name, tensors
        return None

    def refusal(self, weight: Weight) -> str | None:
        """Always refuses, naming the tensors."""
        found = [
            f"{ref.name!r} {ref.dtype} {list(ref.shape)}"
            for ref in list(weight.parts.values())[:_SHOWN]
        ]
        return (
            f"weight {weight.name!r} is stored in a format for which there is no decoder here: "
            f"{', '.join(found)}; `compact` writes it by scores of the model in another format"
        )

    def decode(self, weight: Weight, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Never called: `refusal` comes first.

        Raises:
            ReapStreamError: always.
        """
        del parts, out
        message = f"{weight.name!r} cannot be decoded"
        raise ReapStreamError(message)
