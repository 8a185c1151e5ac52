"""Next-token-prediction (MTP) layers, which transformers does not load with the model.

A checkpoint holds them behind its decoder layers (`model.layers.N` with N past the last, as GLM-4
and DeepSeek-V3) or beside them (`mtp.layers.0`, as Qwen3-Next). Such a layer is sliced as the
decoder layer whose names it repeats.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping

from reap_stream.checkpoint.refs import Role, TensorRef
from reap_stream.errors import UnsupportedError
from reap_stream.model.architecture import Architecture

LAYER_NAME = re.compile(r"^(?:.*?\.)?layers\.(\d+)\.(.+)$")
"""Splits a tensor's name into the number of its layer and what stands behind it."""


def map_mtp(
    architecture: Architecture,
    roles: dict[str, Role],
    tensors: Mapping[str, TensorRef],
    taken: Collection[str],
    weights: Collection[str],
) -> dict[str, tuple[int, str]]:
    """Finds MTP layers and gives their tensors roles.

    Args:
        architecture: the model.
        roles: those of the decoder's tensors; receives those of MTP tensors.
        tensors: the checkpoint.
        taken: tensors that feed the decoder.
        weights: of these, the weights themselves, without scales and other companions.

    Returns:
        Name → (layer number, rest of the name).

    Raises:
        UnsupportedError: an MTP layer has experts but not all the weights its twin has.
    """
    last = architecture.moe_layers[-1]
    twins = _layer_roles(roles, last)
    weight_roles = {name: role for name, role in roles.items() if name in weights}
    needed = _layer_roles(weight_roles, last).keys()
    found: dict[str, tuple[int, str]] = {}
    for name in tensors:
        match = LAYER_NAME.match(name)
        in_mtp = name.split(".")[0] == "mtp"
        if name in taken or name in roles or not (match or in_mtp):
            continue
        number = int(match[1]) if match else 0
        if in_mtp or number >= architecture.num_layers:
            layer = number + architecture.num_layers if in_mtp else number
            found[name] = (layer, match[2] if match else name)
    for name, (layer, rest) in found.items():
        if rest in twins:
            roles[name] = _moved(twins[rest], layer, name.count(".") - rest.count("."))
    _check_mtp(architecture, needed, roles, found)
    return found


def _check_mtp(
    architecture: Architecture,
    needed: Collection[str],
    roles: Mapping[str, Role],
    found: Mapping[str, tuple[int, str]],
) -> None:
    """Refuses an MTP layer of which only a part could be pruned: it needs its twin's weights.

    Not its twin's scales: prediction layers are often left as they were trained.
    """
    sliced: dict[int, set[str]] = defaultdict(set)
    for name, (layer, rest) in found.items():
        if name in roles:
            sliced[layer].add(rest)
    for layer, rests in sliced.items():
        missing = sorted(set(needed) - rests)
        if missing:
            message = (
                f"next-token-prediction layer {layer} has experts but no {missing[0]!r} as layer "
                f"{architecture.moe_layers[-1]} has ({len(missing)} such): it cannot be pruned "
                "like it"
            )
            raise UnsupportedError(message)


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
    return Role(layer=layer, dim=role.dim, expert=role.expert, component=component)
