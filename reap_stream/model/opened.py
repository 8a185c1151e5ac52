"""A checkpoint and the model it is of, opened together and found to fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reap_stream.checkpoint.configedit import mtp_layer_count
from reap_stream.checkpoint.format_change import KEPT, FormatChange
from reap_stream.checkpoint.source import CONFIG_NAME, Checkpoint, open_checkpoint
from reap_stream.errors import UnsupportedError
from reap_stream.formats import Weight, group_weights, known_formats
from reap_stream.model.architecture import Architecture, read_architecture
from reap_stream.model.roles import Feed, TensorMap, map_tensors, unfed_parameters
from reap_stream.model.transformers_api import KeyMap, get_tensor

_FLOATING = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """What every command that touches a checkpoint starts from.

    Attributes:
        checkpoint: the files.
        architecture: the model.
        keys: transformers' mapping of the checkpoint's keys.
        tensor_map: the checkpoint seen from the model.
        trust_remote_code: the checkpoint's own code may build the model.
        change: how weights will be written, where not as they are; see `reap_stream.recoding`.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    keys: KeyMap
    tensor_map: TensorMap
    trust_remote_code: bool = False
    change: FormatChange = KEPT

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
    check_mtp_count(directory, checkpoint.config, tensor_map)
    return OpenedModel(checkpoint, architecture, keys, tensor_map, trust_remote_code)


def check_mtp_count(directory: Path, config: Mapping[str, Any], tensor_map: TensorMap) -> None:
    """Refuses more layers behind the decoder than config.json says predict further tokens.

    With too small a number of decoder layers in config.json the last ones look like these, would
    be left out of the forward, and pruned by another layer's scores.

    Raises:
        UnsupportedError: there are more.
    """
    said, found = mtp_layer_count(config), len(tensor_map.mtp_layers)
    if 0 < said < found:
        message = (
            f"{directory / CONFIG_NAME}: speaks of {said} next-token-prediction layers, but the "
            f"checkpoint holds {found} layers beside the decoder's (first: layer "
            f"{tensor_map.mtp_layers[0]}); correct num_hidden_layers or that number"
        )
        raise UnsupportedError(message)


def check_forward(model: OpenedModel) -> None:
    """Refuses weights that the forward could not run with, before any work.

    Raises:
        UnsupportedError: a weight is missing, of another shape, or cannot be decoded; the message
            names the tensor.
    """
    for fault in forward_faults(model):
        raise UnsupportedError(fault)


def forward_faults(model: OpenedModel) -> Iterator[str]:
    """Every reason why the forward cannot run, with file and tensor; none where it can."""
    architecture, feeds = model.architecture, model.tensor_map.feeds
    for name in filter(architecture.runs_on_text, unfed_parameters(architecture, feeds)):
        yield (
            f"{model.checkpoint.directory}: no tensor for parameter {name!r}, or none in a format "
            "that is known: the checkpoint is not whole"
        )
    for feed in feeds.values():
        if not architecture.runs_on_text(feed.target):
            continue
        parameter = get_tensor(architecture.model, feed.target)
        weights = [weight for _, group in feed.groups for weight in group]
        refused = False
        for weight in weights:
            reason = weight.format.refusal(weight) or _code_fault(weight, parameter)
            if reason is not None:
                refused = True
                yield f"{next(iter(weight.parts.values())).file}: {reason}"
        if feed.target in architecture.sliced and not refused:
            yield from _uneven_parts(weights)
        elements = sum(math.prod(weight.shape) for weight in weights)
        if _fits(architecture, feed, parameter):
            continue
        yield (
            f"{next(iter(weights[0].parts.values())).file}: tensors like {weights[0].name!r} "
            f"{list(weights[0].shape)} hold {elements} elements, {feed.target} "
            f"{list(parameter.shape)} of the model {parameter.numel()}: config.json and weights "
            "are of two models"
        )


def _uneven_parts(weights: list[Weight]) -> Iterator[str]:
    """Experts are kept in slots of one layout, so what one has all must have."""
    first = weights[0]
    for weight in weights:
        differing = sorted(weight.parts.keys() ^ first.parts.keys())
        if differing:
            yield (
                f"{next(iter(weight.parts.values())).file}: only one of {first.name!r} and "
                f"{weight.name!r} has {' and '.join(differing)}: the checkpoint is not whole"
            )


def _fits(architecture: Architecture, feed: Feed, parameter: torch.Tensor) -> bool:
    """Whether a parameter can be made of these weights, as far as shapes tell."""
    dim = architecture.sliced.get(feed.target)
    weights = [weight for _, group in feed.groups for weight in group]
    if feed.groups[0][0] is None:
        return weights[0].shape == tuple(parameter.shape)
    # A converter may make several parameters of a dense weight, but one of the experts.
    if dim is None:
        return True
    # Of experts that nothing reads there may be a place without a tensor.
    length = parameter.shape[dim]
    read = parameter.numel() // length * (length - architecture.extras.get(feed.target, 0))
    return sum(math.prod(weight.shape) for weight in weights) == read


def _code_fault(weight: Weight, parameter: torch.Tensor) -> str | None:
    """Integers where the model has fractions are codes of a format without a decoder here."""
    dtype = next(iter(weight.parts.values())).dtype
    if not weight.is_plain or dtype in _FLOATING or not parameter.is_floating_point():
        return None
    return f"tensor {weight.name!r} holds {dtype} codes, and no decoder for them is known"
