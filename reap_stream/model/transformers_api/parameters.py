"""Parameters and buffers of a model by name: read, set, computed, and the dtype they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from reap_stream.model.transformers_api.quiet import quiet_transformers


def parameter_dtype(model: Any, name: str, compute: torch.dtype) -> torch.dtype:
    """The dtype in which transformers would hold a parameter when loading in `compute`."""
    stored: torch.dtype = get_tensor(model, name).dtype
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    loose = getattr(model, "_keep_in_fp32_modules", None) or ()
    kept = list(strict) + (list(loose) if compute == torch.float16 else [])
    if compute.itemsize == 2 and any(_names_module(pattern, name) for pattern in kept):
        return torch.float32
    return stored


def _names_module(pattern: str, name: str) -> bool:
    # transformers matches these as globs anywhere in the name, "*" standing for any characters
    position = 0
    for piece in pattern.split("*"):
        found = name.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    return True


def get_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its full name."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    tensor: torch.Tensor | None = module._parameters.get(leaf)
    if tensor is None:
        tensor = module._buffers[leaf]
    if tensor is None:
        raise KeyError(name)
    return tensor


def set_tensor(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Puts a tensor where a parameter or buffer of that name stands."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def tied_names(model: Any, name: str) -> list[str]:
    """The other parameters that a model ties to one, in the order in which they are looked for."""
    sources: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    source = sources.get(name, name)
    twins = [source, *(target for target, own in sources.items() if own == source)]
    return [twin for twin in twins if twin != name]


def materialize_buffers(model: Any, device: torch.device) -> None:
    """Computes the buffers that no checkpoint holds (rotary frequencies) on `device`.

    The way transformers does it after loading: parameters are marked as initialised, so only
    modules that own such a buffer compute anything.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True
    for module in model.modules():
        owned = [n for n in module._buffers if n in module._non_persistent_buffers_set]
        for name in owned:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        module._is_hf_initialized = not owned
    with quiet_transformers():
        model.initialize_weights()
