"""What next-token-prediction (MTP) layers are run on.

Layer k sees, at each position i of a row, the hidden state that its predecessor left there and the
embedding of token i + k + 1: the model's own last hidden states (behind the final norm) for the
first, the outputs of the layer before for the others. A row's last k + 1 positions have no such
token. They are run like padding and never count; attention looks back only, so they reach nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from reap_stream.errors import UnsupportedError
from reap_stream.model.adapters import attach_experts
from reap_stream.model.calls import LayerCall
from reap_stream.model.mtp_head import MtpHead
from reap_stream.model.skeleton import Skeleton
from reap_stream.model.transformers_api import materialize_buffers, mtp_layer_arguments

_TRIAL_TOKENS = 2


def tokens_ahead(tokens: np.ndarray[Any, Any], index: int) -> np.ndarray[Any, Any]:
    """Token ids [rows, width] as prediction layer `index` sees them; 0 where a row has none."""
    ahead = np.zeros_like(tokens)
    ahead[:, : -(index + 1)] = tokens[:, index + 1 :]
    return ahead


class MtpInputs:
    """Makes the inputs of prediction layers.

    Args:
        head: the layers.
        skeleton: the model around the decoder's layers.
        device: where layers run.
    """

    def __init__(self, head: MtpHead, skeleton: Skeleton, device: torch.device) -> None:
        self._built = head.opened.architecture.model
        self._skeleton = skeleton
        self._device = device
        _materialize(self._built, device)

    def call(
        self, index: int, tokens: np.ndarray[Any, Any], hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, LayerCall]:
        """What a prediction layer is run on and called with.

        Args:
            index: which layer, from 0.
            tokens: int64 [rows, width] token ids.
            hidden_states: [rows, width, hidden] of the last decoder layer, or of the prediction
                layer before.

        Returns:
            Embeddings [rows, width, hidden] of the tokens to come, and the rest of the call.
        """
        if index == 0:
            hidden_states = self._skeleton.last_hidden_state(tokens, hidden_states)
        embeddings = self._skeleton.look_up(self._built.embed_tokens, tokens_ahead(tokens, index))
        positions = _positions(tokens.shape[1], index, self._device)
        arguments = mtp_layer_arguments(self._built, index, embeddings, positions)
        return embeddings, LayerCall((hidden_states,), arguments)


def try_mtp(head: MtpHead, device: torch.device) -> None:
    """Runs every prediction layer once without weights, to find now what would fail later.

    Args:
        head: the layers.
        device: where masks and position embeddings will be made.

    Raises:
        UnsupportedError: a layer cannot be called as transformers calls prediction layers.
    """
    architecture = head.opened.architecture
    built = architecture.model
    _materialize(built, device)
    shape = (1, _TRIAL_TOKENS, built.config.hidden_size)
    hidden = torch.zeros(shape, dtype=built.dtype, device=device)
    for index in range(architecture.num_layers):
        path = architecture.experts_paths.get(index)
        if path is not None:
            attach_experts(built, path, lambda states, _index, _weights: torch.zeros_like(states))
        try:
            positions = _positions(_TRIAL_TOKENS, index, device)
            arguments = mtp_layer_arguments(built, index, hidden, positions)
            with torch.inference_mode():
                built.layers[index](_to_meta(hidden), _to_meta(hidden), **_to_meta(arguments))
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            message = f"{architecture.name} cannot be called as transformers calls them: {error}"
            raise UnsupportedError(message) from error
        finally:
            if path is not None:
                attach_experts(built, path, None)


def _positions(width: int, index: int, device: torch.device) -> torch.Tensor:
    return torch.arange(index + 1, width + index + 1, device=device)[None]


def _materialize(built: Any, device: torch.device) -> None:
    """Computes buffers that no checkpoint holds; those of the shared rotary embedding often are."""
    if any(
        buffer.is_meta for name, buffer in built.named_buffers() if name not in built.state_dict()
    ):
        materialize_buffers(built, device)


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, Mapping):
        return {key: _to_meta(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_to_meta, value))
    return value
