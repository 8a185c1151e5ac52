"""Next-token-prediction (MTP) layers that can be run: transformers' own, fed from the checkpoint.

They look like a second small model of which one layer at a time is in memory: an architecture, the
checkpoint's key mapping and what each parameter is made of. So whatever streams the decoder's
layers streams these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from reap_stream.errors import UnsupportedError
from reap_stream.formats import Weight, group_weights, known_formats
from reap_stream.model.adapters import is_experts_module
from reap_stream.model.architecture import Architecture
from reap_stream.model.opened import OpenedModel, forward_faults
from reap_stream.model.roles import TensorMap, collect_feeds, unfed_parameters
from reap_stream.model.routing import read_routing
from reap_stream.model.transformers_api import (
    LAYERS_PATH,
    block_name,
    build_mtp_model,
    mtp_key_map,
    mtp_kinds,
    shared_mtp_names,
)


@dataclass(frozen=True, slots=True)
class MtpHead:
    """The prediction layers of a model.

    Attributes:
        opened: they, seen as a model; its layer k is the checkpoint's `first` + k.
        first: number of the first of them, as `Role.layer` has it.
        values: what had to be said of them beside the model's config.
    """

    opened: OpenedModel
    first: int
    values: Mapping[str, Any]

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of those with routed experts, ascending."""
        return [self.first + index for index in self.opened.architecture.moe_layers]

    def reduced(self, architecture: Architecture) -> Architecture:
        """The same layers for a model with fewer experts.

        Args:
            architecture: that model.

        Raises:
            UnsupportedError: transformers cannot build them.
        """
        count = self.opened.architecture.num_layers
        built = build_mtp_model(architecture.model, count, self.values)
        return _architecture(architecture, built, count)


def read_mtp_head(model: OpenedModel) -> MtpHead:
    """The prediction layers of a checkpoint, found to be what transformers runs.

    Args:
        model: the checkpoint; holds at least one such layer with routed experts.

    Raises:
        UnsupportedError: transformers cannot build them, or not from these tensors; the message
            says why.
    """
    numbers, first = model.tensor_map.mtp_layers, model.architecture.num_layers
    if numbers != tuple(range(first, first + len(numbers))):
        message = f"prediction layers are numbered {list(numbers)}, expected {first} and on"
        raise UnsupportedError(message)
    kinds, mlps = mtp_kinds(model.architecture.model)
    sparse = model.mtp_kept_layers()
    values: dict[str, Any] = {}
    if mlps:
        types = ["sparse" if number in sparse else "dense" for number in numbers]
        values["mtp_mlp_layer_types"] = types
    failure: str | None = None
    choices = [{"mtp_layer_types": [kind] * len(numbers)} for kind in kinds or ()]
    for chosen in choices or [{}]:
        head = _build(model, len(numbers), {**values, **chosen})
        fault = next(_faults(head, model), None)
        if fault is None:
            return head
        failure = failure or fault
    raise UnsupportedError(failure)


def _build(model: OpenedModel, count: int, values: Mapping[str, Any]) -> MtpHead:
    architecture, checkpoint = model.architecture, model.checkpoint
    built = build_mtp_model(architecture.model, count, values)
    keys = mtp_key_map(architecture.model, built, architecture.num_layers, count)
    feeds, _ = collect_feeds(keys, _weights(model))
    tensor_map = TensorMap(
        feeds,
        model.tensor_map.roles,
        model.tensor_map.mtp_layers,
        model.tensor_map.mtp_tensors,
    )
    opened = OpenedModel(checkpoint, _architecture(architecture, built, count), keys, tensor_map)
    return MtpHead(opened, architecture.num_layers, values)


def _weights(model: OpenedModel) -> dict[str, Weight]:
    names = model.tensor_map.mtp_tensors
    tensors = {name: ref for name, ref in model.checkpoint.tensors.items() if name in names}
    return group_weights(tensors, known_formats(model.checkpoint.config))


def _architecture(decoder: Architecture, built: Any, count: int) -> Architecture:
    """The prediction layers as an architecture, sliced as the decoder's layers are."""
    found = [name for name, module in built.named_modules() if is_experts_module(module)]
    paths = {int(name.split(".")[1]): name for name in found}
    sliced = _like_twin(decoder, built, decoder.sliced)
    outside = (name for name in built.state_dict() if not name.startswith(f"{LAYERS_PATH}."))
    routing = decoder.routing
    if paths:
        number, path = next(iter(paths.items()))
        routing = read_routing(built, f"{LAYERS_PATH}.{number}", path, sliced)
    return replace(
        decoder,
        name=f"{decoder.name}'s prediction layers",
        model=built,
        layers_path=LAYERS_PATH,
        text_path="",
        num_layers=count,
        experts_paths=paths,
        routing=routing,
        sliced=sliced,
        extras=_like_twin(decoder, built, decoder.extras),
        # Embeddings and head are the model's.
        tied=frozenset(outside),
    )


def _like_twin(decoder: Architecture, built: Any, told: Mapping[str, int]) -> dict[str, int]:
    """What is told of the last MoE layer's parameters, of the blocks that repeat it."""
    twin = f"{decoder.layers_path}.{decoder.moe_layers[-1]}."
    by_rest = {name.removeprefix(twin): n for name, n in told.items() if name.startswith(twin)}
    rests = {name: block_name(name) for name in built.state_dict()}
    return {name: by_rest[rest] for name, rest in rests.items() if rest in by_rest}


def _faults(head: MtpHead, model: OpenedModel) -> Iterator[str]:
    """Why the layers cannot be run as transformers would run them."""
    architecture = head.opened.architecture
    for name in architecture.tied:
        if not name.startswith(("embed_tokens.", "shared_head.")):
            yield f"{architecture.name} share {name!r}, and this version cannot run that"
    sparse = model.mtp_kept_layers()
    if head.moe_layers != list(sparse):
        yield (
            f"layers {list(sparse)} of the checkpoint have experts, layers {head.moe_layers} of "
            "transformers' prediction layers have"
        )
    unused = _unused(head, model)
    unfed = unfed_parameters(architecture, head.opened.tensor_map.feeds)
    if unused and unfed:
        # One of the two alone: the checkpoint is not whole, or has what this model has not.
        yield (
            f"transformers finds no tensor for {unfed[0]!r} of its prediction layers and has no "
            f"place for tensor {unused[0]!r}: it does not know the names of this family's, which "
            "a newer release may"
        )
    yield from forward_faults(head.opened)
    for name in unused:
        yield f"transformers' prediction layers have no place for tensor {name!r}"


def _unused(head: MtpHead, model: OpenedModel) -> list[str]:
    """Weights of the layers that nothing is made of, but for those that are the model's."""
    names = shared_mtp_names(head.opened.architecture.model)
    shared = re.compile("|".join(map(re.escape, names)) or "$^")
    feeds = head.opened.tensor_map.feeds.values()
    fed = {weight.name for feed in feeds for _, group in feed.groups for weight in group}
    return [
        name
        for name in sorted(_weights(model).keys() - fed)
        if not shared.search(name) and "rotary_emb" not in name
    ]
