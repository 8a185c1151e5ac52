"""Weight formats: one file each, asked in order. See `reap_stream.formats.base`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.errors import CheckpointError
from reap_stream.formats.awq import Awq
from reap_stream.formats.base import Weight, WeightFormat, member
from reap_stream.formats.fp8 import DEFAULT_BLOCK, Fp8
from reap_stream.formats.gptq import Gptq
from reap_stream.formats.int8 import Int8
from reap_stream.formats.mxfp4 import Mxfp4
from reap_stream.formats.mxfp4_experts import Mxfp4Experts
from reap_stream.formats.nvfp4 import Nvfp4
from reap_stream.formats.packed_int import PackedInt
from reap_stream.formats.plain import TORCH_DTYPES, Plain
from reap_stream.formats.settings import quantization_settings, schemes, weight_block

__all__ = [
    "TORCH_DTYPES",
    "Weight",
    "WeightFormat",
    "group_weights",
    "known_formats",
    "member",
]


def known_formats(config: Mapping[str, Any]) -> tuple[WeightFormat, ...]:
    """The formats, set up as the checkpoint's config.json says, in the order they are asked in.

    Raises:
        CheckpointError: its quantisation settings are malformed.
    """
    settings = quantization_settings(config)
    said = schemes(settings)
    named = (weight_block(settings), *(s.block for s in said if s.kind == "float"))
    blocks = dict.fromkeys(block for block in named if block is not None)
    return (
        PackedInt(said),
        Gptq(settings),
        Awq(settings),
        Nvfp4(),
        Mxfp4(),
        Mxfp4Experts(),
        Int8(next(iter(blocks), None)),
        Fp8(*(blocks or (DEFAULT_BLOCK,))),
        Plain(),
    )


def group_weights(
    tensors: Mapping[str, TensorRef], formats: Sequence[WeightFormat]
) -> dict[str, Weight]:
    """Gathers the tensors of a checkpoint into weights.

    Returns:
        Weight name → weight. Scales and the like belong to their weight and have no entry of
        their own; tensors of formats that no decoder knows have none either.

    Raises:
        CheckpointError: a weight is there twice, in two formats.
    """
    weights: dict[str, Weight] = {}
    companions: set[str] = set()
    for name in tensors:
        claims = (fmt.claim(name, tensors) for fmt in formats)
        weight = next((claim for claim in claims if claim is not None), None)
        if weight is None:
            continue
        if weight.name in weights:
            twice = (next(iter(w.parts.values())) for w in (weights[weight.name], weight))
            one, other = (f"{ref.name!r} ({ref.dtype})" for ref in twice)
            message = (
                f"{tensors[name].file}: {weight.name!r} is there twice, as {one} and as {other}; "
                "remove the one that is not meant"
            )
            raise CheckpointError(message)
        weights[weight.name] = weight
        companions.update(ref.name for ref in weight.parts.values() if ref.name != weight.name)
    return {name: weight for name, weight in weights.items() if name not in companions}
