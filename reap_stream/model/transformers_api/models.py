"""The config of a checkpoint, the model class for it, and that model without weights."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from reap_stream.errors import UnsupportedError
from reap_stream.model.transformers_api.experts_call import (
    EXPERTS_IMPLEMENTATION,
    register_experts,
)
from reap_stream.model.transformers_api.quiet import quiet_transformers

_AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
# What transformers raises for a config it cannot read.
_CONFIG_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    RecursionError, OSError, StrictDataclassError,
)  # fmt: skip


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
    """The model for `config` that speaks, without weights, experts calling us.

    It is of the class that the config's `architectures` names where that is one of those by which
    transformers loads such a config; so a vision-language checkpoint is built whole.

    Raises:
        UnsupportedError: transformers has no language model for this config.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    register_experts()
    own_code = trust_remote_code and type(config) not in CONFIG_MAPPING.values()
    try:
        with quiet_transformers(), torch.device("meta"):
            model: PreTrainedModel = _choose_auto_class(config, own_code=own_code).from_config(
                config,
                dtype=dtype,
                experts_implementation=EXPERTS_IMPLEMENTATION,
                trust_remote_code=own_code,
            )
    except (ValueError, KeyError, AttributeError, TypeError, ImportError, RuntimeError) as error:
        message = (
            f"transformers cannot build a language model for model type "
            f"{getattr(config, 'model_type', None)!r}: {error}"
        )
        raise UnsupportedError(message) from error
    return model.eval()


def _choose_auto_class(config: Any, *, own_code: bool) -> Any:
    """Of the ways to load a language model, the one that leads to the config's own class."""
    if own_code:
        mapped = getattr(config, "auto_map", None) or {}
        return next((a for a in _AUTO_CLASSES if a.__name__ in mapped), AutoModelForCausalLM)
    known = [auto for auto in _AUTO_CLASSES if type(config) in auto._model_mapping]
    wanted = getattr(config, "architectures", None) or []
    for auto in known:
        classes = auto._model_mapping[type(config)]
        for kind in classes if isinstance(classes, list | tuple) else (classes,):
            if kind.__name__ in wanted:
                return auto
    return known[0] if known else AutoModelForCausalLM


def load_tokenizer(directory: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer that lies in a checkpoint's directory."""
    with quiet_transformers():
        return AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
