"""Next-token-prediction (MTP) layers of a checkpoint that is not there.

transformers does not build these layers, so no meta model shows them. The index names their
tensors; without one the config tells how many layers follow. Most of their tensors repeat a
decoder layer's, the few others follow DeepSeek-V3 and GLM-4.5: a projection that joins hidden
states and embeddings, norms of both, and embeddings and a head of their own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from reap_stream.model.architecture import Architecture
from reap_stream.model.mtp import mtp_place

Spec = tuple[str, tuple[int, ...]]
"""safetensors dtype tag and shape of a tensor."""

_LAYER: Final = re.compile(r"^(?P<prefix>(?:.*\.)?layers\.)(?P<number>\d+)\.(?P<rest>.+)$")
_COUNT_KEY: Final = "num_nextn_predict_layers"
_EXTRAS: Final = (
    "eh_proj.weight",
    "enorm.weight",
    "hnorm.weight",
    "embed_tokens.weight",
    "shared_head.norm.weight",
    "shared_head.head.weight",
)
_SHAPES: Final = (
    (re.compile(r"(?:^|\.)(?:eh_proj|fc)\.weight$"), ("hidden", "joined")),
    (re.compile(r"norm[^.]*\.weight$"), ("hidden",)),
    (re.compile(r"(?:^|\.)(?:embed_tokens|head|lm_head)\.weight$"), ("vocabulary", "hidden")),
)


class Twins:
    """The decoder layer that an MTP layer repeats: the last with experts.

    Args:
        tensors: the tensors of the decoder's layers by name.
        architecture: the model.

    Attributes:
        prefix: what stands before the layer's number in its tensors' names.
        last: its tensors by the name behind the number.
    """

    def __init__(self, tensors: Mapping[str, Spec], architecture: Architecture) -> None:
        self.prefix = ""
        self.last: dict[str, Spec] = {}
        self._any: dict[str, Spec] = {}
        for name, spec in tensors.items():
            match = _LAYER.match(name)
            if match is None:
                continue
            self._any[match["rest"]] = spec
            if int(match["number"]) == architecture.moe_layers[-1]:
                self.prefix = match["prefix"]
                self.last[match["rest"]] = spec

    def get(self, rest: str) -> Spec | None:
        """Dtype and shape by name; of another layer where layers differ in kind."""
        return self.last.get(rest) or self._any.get(rest)


def assumed_mtp(
    config: Mapping[str, Any], architecture: Architecture, twins: Twins
) -> tuple[list[tuple[str, str]], list[str]]:
    """MTP tensors as config.json lets expect them.

    Only the key of DeepSeek-V3 and GLM counts: MiniMax-M2's speaks of layers that its checkpoint
    does not hold.

    Returns:
        (name, its part behind the layer's number) of each tensor, and notes for the user.
    """
    text = config.get("text_config") or {}
    count = config.get(_COUNT_KEY) or text.get(_COUNT_KEY)
    if type(count) is not int or count < 1:
        return [], []
    if not twins.last:
        return [], [f"{_COUNT_KEY} is {count}, but no index names such layers: none is counted"]
    note = (
        f"{_COUNT_KEY} is {count} and no index tells what that means: assumed to be like the last "
        "MoE layer, with embeddings and a head of their own"
    )
    first = architecture.num_layers
    names = [
        (f"{twins.prefix}{number}.{rest}", rest)
        for number in range(first, first + count)
        for rest in (*twins.last, *_EXTRAS)
    ]
    return names, [note]


def listed_mtp(
    names: Collection[str], num_layers: int, scale_suffix: str | None
) -> Iterator[tuple[str, str]]:
    """MTP tensors that an index lists, scales left out.

    Args:
        names: every name of the index.
        num_layers: decoder layers; higher numbers are MTP layers.
        scale_suffix: what a scale's name adds to its weight's.

    Yields:
        (name, its part behind the layer's number, or the name where it has none).
    """
    for name in names:
        place = mtp_place(name, num_layers)
        is_scale = scale_suffix is not None and name.endswith(f"weight{scale_suffix}")
        if place is not None and not is_scale:
            yield name, place[1]


def extra_shape(name: str, architecture: Architecture) -> tuple[int, ...] | None:
    """The shape of a tensor that only MTP layers have; None where its name tells none."""
    vocabulary, hidden = architecture.embedding.weight.shape
    lengths = {"vocabulary": vocabulary, "hidden": hidden, "joined": 2 * hidden}
    for pattern, dims in _SHAPES:
        if pattern.search(name):
            return tuple(int(lengths[dim]) for dim in dims)
    return None
