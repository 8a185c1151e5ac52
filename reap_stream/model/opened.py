"""A checkpoint and the model it is of, opened together and found to fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from reap_stream.checkpoint.source import Checkpoint, open_checkpoint
from reap_stream.errors import UnsupportedError
from reap_stream.formats import Weight, group_weights, known_formats
from reap_stream.model.architecture import Architecture, read_architecture
from reap_stream.model.roles import TensorMap, map_tensors
from reap_stream.model.transformers_api import KeyMap


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """What every command that touches a checkpoint starts from.

    Attributes:
        checkpoint: the files.
        architecture: the model.
        keys: transformers' mapping of the checkpoint's keys.
        tensor_map: the checkpoint seen from the model.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    keys: KeyMap
    tensor_map: TensorMap

    def mtp_kept_layers(self) -> tuple[int, ...]:
        """Next-token-prediction layers that hold routed experts."""
        roles = self.tensor_map.roles.values()
        with_experts = {role.layer for role in roles if role.layer is not None}
        return tuple(layer for layer in self.tensor_map.mtp_layers if layer in with_experts)


def open_model(
    directory: Path, *, dtype: torch.dtype = torch.bfloat16, trust_remote_code: bool = False
) -> OpenedModel:
    """Opens a checkpoint: headers, config, architecture, and what each tensor is for.

    Raises:
        CheckpointError: the files are damaged, inconsistent or unsafe.
        UnsupportedError: the model or its layout is none that can be pruned.
    """
    checkpoint = open_checkpoint(directory)
    architecture = read_architecture(
        directory, checkpoint.config, dtype=dtype, trust_remote_code=trust_remote_code
    )
    keys = KeyMap(architecture.model)
    weights = group_weights(checkpoint.tensors, known_formats(checkpoint.config))
    tensor_map = map_tensors(architecture, keys, checkpoint.tensors, weights)
    return OpenedModel(checkpoint, architecture, keys, tensor_map)


def check_forward(model: OpenedModel) -> None:
    """Refuses weights that cannot be decoded, before any work.

    Raises:
        UnsupportedError: a weight's format is not known, or it cannot be decoded; the message
            names file and tensor.
    """
    for weight in _weights(model):
        reason = weight.format.refusal(weight)
        if reason is not None:
            file = next(iter(weight.parts.values())).file
            message = f"{file}: {reason}"
            raise UnsupportedError(message)


def _weights(model: OpenedModel) -> Iterable[Weight]:
    for feed in model.tensor_map.feeds.values():
        for _, weights in feed.groups:
            yield from weights
