"""Weight formats: one file each, asked in order. See `reap_stream.formats.base`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.errors import CheckpointError
from reap_stream.formats.base import Weight, WeightFormat
from reap_stream.formats.fp8 import DEFAULT_BLOCK, Fp8
from reap_stream.formats.plain import TORCH_DTYPES, Plain

__all__ = ["TORCH_DTYPES", "Weight", "WeightFormat", "group_weights", "known_formats"]


def known_formats(config: Mapping[str, Any]) -> tuple[WeightFormat, ...]:
    """The formats, set up as the checkpoint's config.json says.

    Raises:
        CheckpointError: its quantisation settings are malformed.
    """
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        message = f"config.json: quantization_config is {quantization!r}, expected an object"
        raise CheckpointError(message)
    block = quantization.get("weight_block_size") or DEFAULT_BLOCK
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    if not is_pair or not all(type(n) is int and n > 0 for n in block):
        message = f"config.json: weight_block_size is {block!r}, expected two positive integers"
        raise CheckpointError(message)
    return (Fp8((block[0], block[1])), Plain())


def group_weights(
    tensors: Mapping[str, TensorRef], formats: Sequence[WeightFormat]
) -> dict[str, Weight]:
    """Gathers the tensors of a checkpoint into weights.

    Returns:
        Weight name → weight. Scales and the like belong to their weight and have no entry of
        their own; tensors of formats that no decoder knows have none either.
    """
    weights: dict[str, Weight] = {}
    companions: set[str] = set()
    for name in tensors:
        claims = (fmt.claim(name, tensors) for fmt in formats)
        weight = next((claim for claim in claims if claim is not None), None)
        if weight is not None:
            weights[name] = weight
            companions.update(ref.name for ref in weight.parts.values() if ref.name != name)
    return {name: weight for name, weight in weights.items() if name not in companions}
