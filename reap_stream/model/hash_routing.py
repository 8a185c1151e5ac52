"""Routers that look the experts of a token up in a table, found by the form of what they hold.

The table is the one tensor of whole numbers beside a router's weights: for each token id, as many
expert numbers as a token is sent to.
"""

from __future__ import annotations

import torch

from reap_stream.errors import UnsupportedError
from reap_stream.model.architecture import Architecture

_TABLE_DIMS = 2


def token_tables(architecture: Architecture) -> dict[str, int]:
    """Parameters and saved buffers that send tokens to fixed experts → their layer.

    Raises:
        UnsupportedError: a router holds whole numbers in another form; they may be experts.
    """
    routers = {name.rpartition(".")[0] for name in architecture.sliced}
    vocabulary = architecture.embedding.weight.shape[0]
    top_k = architecture.routing.experts_per_token
    state: dict[str, torch.Tensor] = architecture.model.state_dict()
    found = {}
    for name, tensor in state.items():
        layer = architecture.layer_of(name)
        is_number = not (tensor.is_floating_point() or tensor.dtype == torch.bool)
        beside = layer in architecture.experts_paths and name.rpartition(".")[0] in routers
        if not is_number or not beside or tensor.numel() <= 1:
            continue
        if tuple(tensor.shape) != (vocabulary, top_k) or tensor.dim() != _TABLE_DIMS:
            message = (
                f"{architecture.name}: {name} {list(tensor.shape)} holds whole numbers beside a "
                f"router and is no table of {vocabulary} tokens × {top_k} experts; what pruning "
                "should make of it is not known"
            )
            raise UnsupportedError(message)
        assert layer is not None
        found[name] = layer
    return found
