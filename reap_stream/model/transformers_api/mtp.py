"""transformers' own model of next-token-prediction (MTP) layers, built without weights.

transformers runs these layers for speculative decoding: `MtpModel` puts a decoder layer of the
model's own class behind two norms and the projection that joins the model's last hidden states with
the next tokens' embeddings. Everything a pass needs of it is asked here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import __version__
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from reap_stream.errors import UnsupportedError
from reap_stream.model.transformers_api.keymap import KeyMap
from reap_stream.model.transformers_api.quiet import quiet_transformers

try:
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel
except ImportError:  # A release that runs no such layers.
    MtpModel = None

LAYERS_PATH = "layers"
_BLOCK = "mtp_block"
_BUILD_ERRORS = (
    ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError, StopIteration,
    NotImplementedError,
)  # fmt: skip


def mtp_kinds(model: Any) -> tuple[list[str] | None, bool]:
    """What must be said of prediction layers, since the model's config does not say it.

    Returns:
        Kinds of decoder layers among which a prediction layer's is to be found, None where there
        are none or the config names it; and whether the kind of their MLPs must be said.
    """
    config = _text_config(model.config)
    types = getattr(config, "layer_types", None)
    told = getattr(config, "mtp_layer_types", None)
    # Full attention first: engines take it where nothing tells (Qwen3-Next has no key for it).
    kinds = (
        None if types is None or told else sorted(set(types), key=lambda t: (t[:4] != "full", t))
    )
    mlp = getattr(config, "mlp_layer_types", None)
    return kinds, mlp is not None and not getattr(config, "mtp_mlp_layer_types", None)


def build_mtp_model(model: Any, count: int, changes: Mapping[str, Any]) -> Any:
    """Transformers' prediction layers for a model, on the meta device.

    Args:
        model: the model without weights; embeddings, head and rotary embedding are shared.
        count: prediction layers.
        changes: config values that transformers' config class lacks.

    Raises:
        UnsupportedError: transformers cannot build them.
    """
    if MtpModel is None:
        message = f"transformers {__version__} runs no next-token-prediction layers"
        raise UnsupportedError(message)
    main = copy.copy(model)
    main.config = copy.deepcopy(model.config)
    try:
        text = _text_config(main.config)
        for key, value in {"num_mtp_layers": count, **changes}.items():
            setattr(text, key, value)
        with quiet_transformers(), torch.device("meta"), _default_dtype(model.dtype):
            built = MtpModel(main, count)
    except _BUILD_ERRORS as error:
        message = (
            f"transformers {__version__} cannot build the next-token-prediction layers of "
            f"{type(model).__name__}: {error}"
        )
        raise UnsupportedError(message) from error
    # What the family says of its modules holds for the blocks, which are of the same classes.
    built._init_weights = model._init_weights
    for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        setattr(built, name, getattr(model, name, None))
    return built.eval()


def mtp_key_map(model: Any, built: Any, num_layers: int, count: int) -> KeyMap:
    """Checkpoint key → parameter of the prediction layers, as transformers loads them.

    Args:
        model: the model they belong to.
        built: what `build_mtp_model` gave.
        num_layers: decoder layers.
        count: prediction layers.
    """
    numbers = [
        WeightRenaming(rf"layers\.{num_layers + k}\.", f"layers.{k}.{_BLOCK}.")
        for k in range(count)
    ]
    own = get_model_conversion_mapping(built, add_legacy=False)
    decoder = get_model_conversion_mapping(model, add_legacy=True)
    # Bailing's and MiMo's name of the norm behind the block, which transformers does not know.
    last = [WeightRenaming(rf"\.{_BLOCK}\.final_layernorm\.", ".post_norm.")]
    return KeyMap(built, [*numbers, *own, *decoder, *last])


def block_name(parameter: str) -> str | None:
    """A prediction layer's parameter as the decoder layer's that it repeats; None for others."""
    head, found, rest = parameter.partition(f".{_BLOCK}.")
    return rest if found and head.startswith(f"{LAYERS_PATH}.") else None


def shared_mtp_names(built: Any) -> tuple[str, ...]:
    """Ends of the names of tensors that a checkpoint may hold twice, of which the model's count."""
    return tuple(built._keys_to_ignore_on_load_unexpected or ())


def mtp_layer_arguments(
    built: Any, index: int, embeddings: torch.Tensor, positions: torch.Tensor
) -> dict[str, Any]:
    """What transformers calls a prediction layer with besides embeddings and hidden states.

    Args:
        built: the prediction layers.
        index: which of them, from 0.
        embeddings: [rows, width, hidden] of the tokens to come.
        positions: int64 [1, width], positions of these tokens.
    """
    # An empty cache tells the masks how far ahead of the model this layer runs.
    cache = MtpCache(config=built.config)
    arguments: dict[str, Any] = built.create_masks_for_mtp_layer(
        index, embeddings, cache, positions
    )
    arguments.setdefault("attention_mask", None)
    rotary: nn.Module | None = built.rotary_emb
    position_embeddings = None
    if rotary is not None:
        per_layer = getattr(built, "has_per_layer_rope", False)
        kind = {"layer_type": built.config.layer_types[index]} if per_layer else {}
        position_embeddings = rotary(embeddings, position_ids=positions, **kind)
    return {
        **arguments,
        "position_embeddings": position_embeddings,
        "position_ids": positions,
        "past_key_values": None,
    }


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)
