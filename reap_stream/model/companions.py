"""Tensors that no parameter takes, judged by their neighbours.

What lies beside an expert's weights (scales of activations, calibration values of a format) means
nothing to the forward but travels with the expert. What seems to hold experts and has no such
neighbour is refused: left as it is, it would belong to other experts than before.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from reap_stream.checkpoint.refs import Role, TensorRef
from reap_stream.errors import UnsupportedError
from reap_stream.model.architecture import Architecture
from reap_stream.model.mtp import LAYER_NAME
from reap_stream.model.unknown import name_stems

_EXPERT: Final = re.compile(r"(?:^|\.)experts\.(\d+)\.")
# Buffers of old checkpoints that transformers computes itself; their length means nothing.
_COMPUTED: Final = re.compile(r"rotary_emb\.inv_freq$|position_ids$")


def adopt_companions(roles: dict[str, Role], tensors: Mapping[str, TensorRef]) -> None:
    """Gives tensors without a role that of the expert, or of the experts tensor, they belong to.

    Args:
        roles: roles of tensors that parameters are made of; companions are added.
        tensors: the checkpoint's tensors by name.
    """
    modules: dict[str, Role] = {}
    for name, role in roles.items():
        if role.expert is not None and role.component is not None:
            modules[name.rpartition(".")[0]] = role
            # Beside its projections an expert may have values of its own.
            modules[".".join(name.split(".")[: role.component + 1])] = role
    fused = {name: role for name, role in roles.items() if role.dim is not None}
    for name in tensors.keys() - roles.keys():
        found = modules.get(name.rpartition(".")[0])
        if found is None:
            owner = next((n for n in name_stems(name) if n in fused), None)
            found = fused[owner] if owner else None
        if found is not None:
            roles[name] = found


def refuse_unclaimed_experts(
    architecture: Architecture, unclaimed: Mapping[str, TensorRef], mtp: Collection[str]
) -> None:
    """Refuses tensors that seem to hold experts of which nothing is known.

    Args:
        architecture: the model.
        unclaimed: tensors that no parameter takes and that are no companions.
        mtp: names of the tensors of prediction layers.

    Raises:
        UnsupportedError: there is one.
    """
    moe = set(architecture.moe_layers)
    for name, ref in unclaimed.items():
        if _COMPUTED.search(name):
            continue
        match = LAYER_NAME.match(name)
        # `mtp.layers.0` is not layer 0, and as wide as there are experts only by chance.
        in_moe = match is not None and int(match[1]) in moe and name not in mtp
        is_expert = _EXPERT.search(name) or (name in mtp and ".experts." in name)
        if is_expert or (in_moe and architecture.num_experts in ref.shape):
            message = (
                f"{ref.file}: tensor {name!r} {list(ref.shape)} seems to hold experts, but "
                f"{architecture.name} in transformers has no parameter for it; pruning without "
                "it would damage the model"
            )
            raise UnsupportedError(message)
