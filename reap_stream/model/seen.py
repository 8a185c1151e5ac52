"""What a model's head sees, kept in the place of its last layer's outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from reap_stream.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Seen:
    """What a model's head sees of a token, in the place of what layers hand on.

    Attributes:
        width: numbers a token; families with several streams of hidden states hand on more.
        dtype: as the head expects it; what layers hand on may be wider.
    """

    width: int
    dtype: torch.dtype

    def laid_out(
        self, hidden: torch.Tensor, token_shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Lays what the head sees out as what layers hand on.

        Args:
            hidden: [n, width].
            token_shape: of what layers hand on.
            dtype: of what layers hand on.

        Returns:
            [n, *token_shape], zero behind what is seen.

        Raises:
            UnsupportedError: the head sees more than layers hand on.
        """
        room = math.prod(token_shape) - self.width
        if room < 0:
            message = (
                f"the head sees {self.width} numbers of a token, layers hand on only "
                f"{list(token_shape)}; this version cannot evaluate such a model"
            )
            raise UnsupportedError(message)
        return functional.pad(hidden.to(dtype), (0, room)).view(len(hidden), *token_shape)

    def taken_from(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, width] out of [n, *token_shape]."""
        return states.reshape(len(states), -1)[:, : self.width].to(self.dtype)
