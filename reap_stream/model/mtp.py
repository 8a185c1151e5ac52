"""Next-token-prediction (MTP) layers, which transformers does not load with the model.

A checkpoint holds them behind its decoder layers (`model.layers.N` with N past the last, as GLM-4
and DeepSeek-V3) or beside them (`mtp.layers.0`, as Qwen3-Next, `model.mtp.layers.0`, as MiMo). Such
a layer is sliced as the decoder layer whose names it repeats.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from reap_stream.checkpoint.refs import Role, TensorRef
from reap_stream.errors import UnsupportedError
from reap_stream.model.architecture import Architecture

LAYER_NAME = re.compile(r"^(?:.*?\.)?layers\.(\d+)\.(.+)$")
"""Splits a tensor's name into the number of its layer and what stands behind it."""
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")
_FUSED_DIMS = 3

Places = Mapping[str, tuple[int, str]]
"""Tensor → number of its prediction layer and the rest of the name."""


@dataclass(frozen=True, slots=True)
class MtpTensors:
    """The tensors of prediction layers.

    Attributes:
        places: tensor → layer number and rest of the name.
        uneven: layers that have another number of experts than the decoder's → that number.
            Nothing that holds for the decoder says how to prune them, so they have no roles.
    """

    places: Places
    uneven: Mapping[int, int]


def mtp_place(name: str, num_layers: int) -> tuple[int, str] | None:
    """Where in the prediction layers a tensor lies, if its name says that it does.

    Args:
        name: a tensor's name; that no decoder parameter takes it is for the caller to know.
        num_layers: decoder layers; prediction layers carry on the count.

    Returns:
        Layer number and the name's part behind it, or the whole name where no number stands in
        it; None for other tensors.
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if is_mtp_folder(part)), None)
    if at is None:
        match = LAYER_NAME.match(name)
        beyond = match is not None and int(match[1]) >= num_layers
        return (int(match[1]), match[2]) if match and beyond else None
    for i in range(at + 1, len(parts) - 1):
        if parts[i].isdigit() and parts[i - 1] != "experts":
            return num_layers + int(parts[i]), ".".join(parts[i + 1 :])
    return num_layers, name


def is_mtp_folder(part: str) -> bool:
    """Whether what lies below this part of a name belongs to prediction layers."""
    return part == "mtp" or part.startswith("mtp_")


def map_mtp(
    architecture: Architecture,
    roles: dict[str, Role],
    tensors: Mapping[str, TensorRef],
    taken: Collection[str],
    weights: Collection[str],
) -> MtpTensors:
    """Finds MTP layers and gives their tensors roles.

    Args:
        architecture: the model.
        roles: those of the decoder's tensors; receives those of MTP tensors.
        tensors: the checkpoint.
        taken: tensors that feed the decoder.
        weights: of these, the weights themselves, without scales and other companions.

    Raises:
        UnsupportedError: an MTP layer has experts but not all the weights its twin has, or what
            lies behind the decoder is a decoder layer.
    """
    last = architecture.moe_layers[-1]
    twins = _layer_roles(roles, last)
    weight_roles = {name: role for name, role in roles.items() if name in weights}
    needed = _layer_roles(weight_roles, last).keys()
    found: dict[str, tuple[int, str]] = {}
    for name in tensors:
        if name not in taken and name not in roles:
            place = mtp_place(name, architecture.num_layers)
            if place is not None:
                found[name] = place
    _refuse_decoder_layers(architecture, tensors, found)
    uneven = _uneven_layers(architecture.num_experts, tensors, found)
    for name, (layer, rest) in found.items():
        twin = twins.get(rest) or _unlike_twin(tensors[name], rest, architecture.num_experts)
        if layer not in uneven and twin is not None:
            roles[name] = _moved(twin, layer, name.count(".") - rest.count("."))
    _check_mtp(architecture, needed, roles, found)
    return MtpTensors(found, uneven)


def _uneven_layers(
    num_experts: int, tensors: Mapping[str, TensorRef], found: Places
) -> dict[int, int]:
    """Layer → its experts, where they are not as many as the decoder's layers have."""
    named: dict[int, set[int]] = defaultdict(set)
    fused: dict[int, int] = {}
    for name, (layer, rest) in found.items():
        match = _EXPERT.search(rest)
        if match:
            named[layer].add(int(match[1]))
        elif _is_fused(tensors[name], rest):
            fused[layer] = tensors[name].shape[0]
    counts = {**fused, **{layer: max(numbers) + 1 for layer, numbers in named.items()}}
    return {layer: count for layer, count in counts.items() if count != num_experts}


def _is_fused(ref: TensorRef, rest: str) -> bool:
    return ".experts." in f".{rest}" and len(ref.shape) >= _FUSED_DIMS


def _unlike_twin(ref: TensorRef, rest: str, num_experts: int) -> Role | None:
    """The role of an experts tensor that is stored otherwise than the decoder's: alone or fused."""
    match = _EXPERT.search(rest)
    if match:
        component = rest[: match.start(1)].count(".")
        return Role(layer=0, expert=int(match[1]), component=component)
    fused = _is_fused(ref, rest) and ref.shape[0] == num_experts
    return Role(layer=0, dim=0) if fused else None


def _refuse_decoder_layers(
    architecture: Architecture, tensors: Mapping[str, TensorRef], found: Places
) -> None:
    """Refuses layers behind the decoder that are decoder layers: config.json counts too few.

    A prediction layer joins hidden states and embeddings, for which it has tensors that no decoder
    layer has.
    """
    decoder, behind = set(), defaultdict(set)
    for name in tensors:
        match = LAYER_NAME.match(name)
        if match is None:
            continue
        if name not in found:
            decoder.add(match[2])
        elif not any(map(is_mtp_folder, name.split("."))):
            behind[int(match[1])].add(match[2])
    for layer, rests in sorted(behind.items()):
        if rests <= decoder:
            message = (
                f"layer {layer} lies behind the {architecture.num_layers} decoder layers that "
                "config.json counts and has only what decoder layers have, so it is no "
                "next-token-prediction layer: correct num_hidden_layers"
            )
            raise UnsupportedError(message)


def _check_mtp(
    architecture: Architecture,
    needed: Collection[str],
    roles: Mapping[str, Role],
    found: Places,
) -> None:
    """Refuses an MTP layer of which only a part could be pruned: it needs its twin's weights.

    Not its twin's scales: prediction layers are often left as they were trained.
    """
    sliced: dict[int, set[str]] = defaultdict(set)
    for name, (layer, rest) in found.items():
        if name in roles:
            sliced[layer].add(rest)
    for layer, rests in sliced.items():
        missing = sorted(_missing(set(needed), rests))
        if missing:
            message = (
                f"next-token-prediction layer {layer} has experts but no {missing[0]!r} as layer "
                f"{architecture.moe_layers[-1]} has ({len(missing)} such): it cannot be pruned "
                "like it"
            )
            raise UnsupportedError(message)


def _missing(needed: set[str], rests: set[str]) -> set[str]:
    """What a layer lacks; experts stored otherwise than the twin's are there."""
    experts = {rest for rest in needed if ".experts." in f".{rest}"}
    otherwise = not experts & rests and any(".experts." in f".{rest}" for rest in rests)
    return (needed - experts if otherwise else needed) - rests


def _layer_roles(roles: Mapping[str, Role], layer: int) -> dict[str, Role]:
    """Roles of one layer by the name's part behind `layers.N.`, components counted in it."""
    found = {}
    for name, role in roles.items():
        match = LAYER_NAME.match(name)
        if match is not None and role.layer == layer:
            found[match[2]] = _moved(role, layer, match[2].count(".") - name.count("."))
    return found


def _moved(role: Role, layer: int, shift: int) -> Role:
    component = None if role.component is None else role.component + shift
    return replace(role, layer=layer, component=component)
