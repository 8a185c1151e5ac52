"""Every use of transformers' less public modules, in one place.

What the rest of the package needs of transformers is: a model class for a config, that model
without weights, the renaming of checkpoint keys to its parameters, and the one call through
which its routed experts run. When a release of transformers moves one of these, this file is
where it is mended.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_mm
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from reap_stream.errors import ReapStreamError, UnsupportedError

EXPERTS_IMPLEMENTATION = "reap_stream"
_RUNNER = "_reap_stream_runner"
# What transformers raises for a config it cannot read.
_CONFIG_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    RecursionError, OSError, StrictDataclassError,
)  # fmt: skip
ExpertsCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' notices about kernels and defaults out of our output."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def load_config(directory: Path, raw: Mapping[str, Any], *, trust_remote_code: bool) -> Any:
    """The transformers config of a checkpoint.

    A model type that transformers knows is read with transformers' own class even where the
    checkpoint brings code, so no code of the checkpoint runs.

    Raises:
        UnsupportedError: the model needs the checkpoint's own code and that was not allowed,
            or transformers does not know the model type.
    """
    model_type = raw.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if not known and "auto_map" in raw and not trust_remote_code:
        message = (
            f"{directory / 'config.json'}: model type {model_type!r} is not part of the installed "
            "transformers and would run code from the checkpoint (auto_map). Read that code, then "
            "pass --trust-remote-code if you trust it."
        )
        raise UnsupportedError(message)
    own_code = trust_remote_code and not known
    try:
        with quiet_transformers(), TemporaryDirectory() as scratch:
            # Read from a file, as transformers decodes some values (infinities) only there.
            (Path(scratch) / "config.json").write_text(json.dumps(dict(raw)), encoding="utf-8")
            for script in directory.glob("*.py") if own_code else ():
                shutil.copy(script, scratch)
            return AutoConfig.from_pretrained(scratch, trust_remote_code=own_code)
    except _CONFIG_ERRORS as error:
        message = (
            f"{directory / 'config.json'}: transformers cannot read this config "
            f"(model type {model_type!r}): {error}"
        )
        raise UnsupportedError(message) from error


def build_meta_model(config: Any, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    """The causal language model for `config`, without weights, experts calling us.

    Raises:
        UnsupportedError: transformers has no causal language model for this config.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _experts_function)
    own_code = trust_remote_code and type(config) not in CONFIG_MAPPING.values()
    try:
        with quiet_transformers(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                experts_implementation=EXPERTS_IMPLEMENTATION,
                trust_remote_code=own_code,
            )
    except (ValueError, KeyError, AttributeError, TypeError, ImportError, RuntimeError) as error:
        message = (
            f"transformers cannot build a causal language model for model type "
            f"{getattr(config, 'model_type', None)!r}: {error}"
        )
        raise UnsupportedError(message) from error
    return model.eval()


def checkpoint_tensors(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in which a checkpoint holds a model's `state`, under the checkpoint's names.

    Args:
        model: the model.
        state: its parameters and buffers by name; meta tensors do.

    Raises:
        UnsupportedError: transformers cannot turn its conversion for this model round.
    """
    try:
        tensors: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    except (RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        message = (
            f"transformers cannot say how a checkpoint of {type(model).__name__} names its "
            f"tensors: {error}"
        )
        raise UnsupportedError(message) from error
    return tensors


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module's forward goes through transformers' registry of experts functions."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_concatenated")


def attach_experts(module: nn.Module, call: ExpertsCall | None) -> None:
    """Makes `call(hidden_states, top_k_index, top_k_weights)` a module's experts; None detaches."""
    setattr(module, _RUNNER, call)


def _experts_function(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    call: ExpertsCall | None = getattr(module, _RUNNER, None)
    if call is None:
        message = f"{type(module).__name__} was called without a layer's weights"
        raise ReapStreamError(message)
    return call(hidden_states, top_k_index, top_k_weights)


def apply_gate(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The family's own way of joining gate and up projections [n, 2 × width] → [n, width]."""
    joined: torch.Tensor = module._apply_gate(hidden)
    return joined


def grouped_product(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows [n, in] sorted by group × weights [groups, in, out]; `ends` int32: end of each group."""
    product: torch.Tensor = _grouped_mm(rows, weights, offs=ends)
    return product


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


class KeyMap:
    """Checkpoint key → parameter of the model, as transformers' own loading maps them."""

    def __init__(self, model: Any) -> None:
        mapping = get_model_conversion_mapping(model, add_legacy=True)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {
            pattern: entry for entry in self._converters for pattern in entry.source_patterns
        }
        self._model = model
        self._state = model.state_dict()

    def target(self, name: str) -> tuple[str, str | None] | None:
        """The parameter a key feeds and the converter pattern it matched; None if it feeds none."""
        prefix = self._model.base_model_prefix
        renamed, pattern = rename_source_key(
            name, self._renamings, self._converters, prefix, self._state
        )
        if renamed not in self._state and name in self._state:
            renamed, pattern = rename_source_key(name, [], [], prefix, self._state)
        return (renamed, pattern) if renamed in self._state else None

    def source_patterns(self, pattern: str) -> list[str]:
        """All source patterns of the converter that owns `pattern`, in the converter's order."""
        return list(self._by_pattern[pattern].source_patterns)

    def stacks_rows(self, pattern: str) -> bool:
        """Whether the converter only stacks experts and joins their rows: no value moves."""
        operations = self._by_pattern[pattern].operations
        stacked = isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
        joined = all(isinstance(op, Concatenate) and op.dim == 1 for op in operations[1:])
        return stacked and joined and len(operations) <= 2

    def convert(
        self, target: str, tensors: Iterable[tuple[str | None, list[torch.Tensor]]]
    ) -> dict[str, torch.Tensor]:
        """Runs the converter of `target` on tensors grouped by source pattern.

        Args:
            target: full name of the (first) parameter the tensors feed.
            tensors: (source pattern, its tensors in checkpoint order).

        Returns:
            Full parameter name → converted tensor.
        """
        groups = dict(tensors)
        pattern = next(iter(groups))
        if pattern is None:
            return {target: groups[None][0]}
        converter = copy.deepcopy(self._by_pattern[pattern])
        for source, values in groups.items():
            converter.collected_tensors[source] = [_deferred(value) for value in values]
        converted = converter.convert(target, model=self._model, config=self._model.config)
        return {
            name: value[0] if isinstance(value, list) else value
            for name, value in converted.items()
        }


def _deferred(value: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: value


def load_tokenizer(directory: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer that lies in a checkpoint's directory."""
    with quiet_transformers():
        return AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
