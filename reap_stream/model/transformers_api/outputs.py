"""What the inner part of a model returns to the model around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput


@dataclass
class BaseOutput(ModelOutput):  # type: ignore[misc]  # transformers declares no types
    """Last hidden states and nothing else; whatever else a family looks for is None."""

    last_hidden_state: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        # Only names that are not there come here. Those of protocols (pickling, copying) stay away.
        if name.startswith("__"):
            raise AttributeError(name)
        return None
