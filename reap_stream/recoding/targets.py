"""What each weight of a checkpoint is for, as far as quantisation minds it.

Asked of the meta model and not of a list of names: linear layers are `nn.Linear` modules of the
decoder's layers, experts the parameters of experts modules. What transformers does not build
(prediction layers) is judged by the decoder's layers whose names it repeats; what is left there
(`eh_proj`, a head of its own) is as little quantised as embeddings, head and vision towers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum, auto
from typing import Final

from torch import nn

from reap_stream.formats import Weight
from reap_stream.model.opened import OpenedModel
from reap_stream.model.transformers_api import get_tensor

NARROW: Final = 128
"""Linear layers with fewer inputs or outputs (gates of shared experts, per-head weights of linear
attention and of sparse-attention indexers) stay as they are in the published FP8 checkpoints."""

_LAYER: Final = re.compile(r"(?:^|\.)layers\.\d+\.(.+)$")
_ONE_EXPERT: Final = re.compile(r"(?:^|\.)experts\.\d+\.")
_MATRIX_DIMS: Final = 2


class Kind(Enum):
    """What a weight is for.

    Attributes:
        EXPERT: a matrix of one routed expert.
        FUSED: matrices of all routed experts of a layer.
        LINEAR: a linear layer of a decoder layer, shared experts included.
        MATRIX: another matrix: embedding, head, router, narrow linear layer, vision tower.
        OTHER: norms, biases, convolutions and the like.
    """

    EXPERT = auto()
    FUSED = auto()
    LINEAR = auto()
    MATRIX = auto()
    OTHER = auto()


def kinds_of(model: OpenedModel, weights: Mapping[str, Weight]) -> dict[str, Kind]:
    """The kind of each weight.

    Args:
        model: the model.
        weights: every weight of the checkpoint, prediction layers included.
    """
    kinds: dict[str, Kind] = {}
    # Of the decoder's layers alone: towers have layers of the same names, which stay as they are.
    by_rest: dict[str, Kind] = {}
    for target, feed in model.tensor_map.feeds.items():
        decoder = model.architecture.layer_of(target) is not None
        for _, group in feed.groups:
            for weight in group:
                kinds[weight.name] = kind = _kind(model, target, weight, len(group))
                match = _LAYER.search(weight.name) if decoder else None
                if match is not None:
                    by_rest.setdefault(match[1], kind)
    mtp = model.tensor_map.mtp_tensors
    for name, weight in weights.items():
        if name not in kinds:
            is_mtp = any(ref.name in mtp for ref in weight.parts.values())
            kinds[name] = _mtp_kind(weight, by_rest) if is_mtp else _unknown(weight)
    return kinds


def _mtp_kind(weight: Weight, by_rest: Mapping[str, Kind]) -> Kind:
    """That of the decoder's weight of the name, or an expert's, for the decoder may have fewer.

    A decoder whose experts lie in one tensor may be followed by a layer that has them apart, and
    the other way round.
    """
    match = _LAYER.search(weight.name)
    rest = match[1] if match else weight.name
    if rest in by_rest:
        return by_rest[rest]
    if _ONE_EXPERT.search(rest) and len(weight.shape) == _MATRIX_DIMS:
        return Kind.EXPERT
    if ".experts." in f".{rest}" and len(weight.shape) > _MATRIX_DIMS:
        return Kind.FUSED
    return _unknown(weight)


def _kind(model: OpenedModel, target: str, weight: Weight, members: int) -> Kind:
    architecture = model.architecture
    layer = architecture.layer_of(target)
    module_name, _, leaf = target.rpartition(".")
    if layer is not None and architecture.experts_paths.get(layer) == module_name:
        # A bias of all experts is a matrix too.
        if leaf.endswith("bias") or get_tensor(architecture.model, target).dim() < _MATRIX_DIMS:
            return Kind.OTHER
        return Kind.EXPERT if members == architecture.num_experts else Kind.FUSED
    module = architecture.model.get_submodule(module_name)
    is_linear = isinstance(module, nn.Linear) and leaf == "weight"
    if not (is_linear or isinstance(module, nn.Embedding)) or len(weight.shape) != _MATRIX_DIMS:
        return _unknown(weight) if target in architecture.sliced else Kind.OTHER
    if layer is None or not is_linear or target in architecture.sliced:
        return Kind.MATRIX
    return Kind.LINEAR if min(weight.shape) >= NARROW else Kind.MATRIX


def _unknown(weight: Weight) -> Kind:
    is_matrix = len(weight.shape) == _MATRIX_DIMS and weight.name.endswith(".weight")
    return Kind.MATRIX if is_matrix else Kind.OTHER
