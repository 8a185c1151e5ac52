"""Weights in formats nobody here knows, recognised by where their tensors lie.

`experts.3.up_proj.W_q` and `experts.3.up_proj.meta` lie in a module whose `weight` the model has
and the checkpoint lacks: they are that weight, however it is stored. So its experts can be told
apart, counted and copied; only the forward needs to know more.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats import Weight
from reap_stream.formats.opaque import Opaque
from reap_stream.model.transformers_api import KeyMap

# Alone these make no weight: then its codes are missing.
_ACCESSORY: Final = re.compile(r"(?:scales?|scale_inv|zero_point|zeros|bias|shape|g_idx)$")


def unknown_weights(
    keys: KeyMap, tensors: Mapping[str, TensorRef], weights: Mapping[str, Weight]
) -> dict[str, Weight]:
    """The weights of unknown format.

    Args:
        keys: the checkpoint's key mapping.
        tensors: the checkpoint.
        weights: the weights of known formats.

    Returns:
        Name of the weight → weight, its parts by their own names, its shape unknown.
    """
    known = {ref.name for weight in weights.values() for ref in weight.parts.values()}
    companions = known - weights.keys()
    found: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    for name, ref in tensors.items():
        owner = None if name in companions else _owner(name, keys, weights)
        if owner is not None and keys.target(name) is None:
            found[owner][name.rpartition(".")[2]] = ref
    opaque = Opaque()
    return {
        owner: Weight(owner, (), opaque, parts)
        for owner, parts in found.items()
        if not all(_ACCESSORY.search(leaf) for leaf in parts)
    }


def name_stems(name: str) -> list[str]:
    """Names of which `name` may be a companion: `a.b_scale_inv` → `a.b_scale`, `a.b`."""
    module, _, leaf = name.rpartition(".")
    parts = leaf.split("_")
    return [f"{module}.{'_'.join(parts[:end])}" for end in range(len(parts) - 1, 0, -1)]


def _owner(name: str, keys: KeyMap, weights: Mapping[str, Weight]) -> str | None:
    """The weight a tensor would be a part of, where the checkpoint has it in no known format."""
    module = name.rpartition(".")[0]
    if f"{module}.weight" in weights or name == f"{module}.weight":
        return None
    owners = [f"{module}.weight", *name_stems(name)]
    if any(owner in weights for owner in owners):
        return None
    return next((owner for owner in owners if keys.target(owner) is not None), None)
