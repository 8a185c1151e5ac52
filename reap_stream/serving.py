"""What an engine will make of a pruned checkpoint, told before it is written.

Facts read from serving engines: experts are spread over devices in equal shares, block-scaled FP8
weights can be cut only between blocks, and static activation scales are reduced to the largest of
a layer's experts when the model is loaded, so removing one expert may change the others.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from reap_stream.checkpoint.layout import OutputPlan, OutputTensor
from reap_stream.checkpoint.mixed_precision import mixed_layers
from reap_stream.checkpoint.reader import Reader
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats import known_formats
from reap_stream.formats.fp8 import DEFAULT_BLOCK, Fp8
from reap_stream.formats.settings import quantization_settings
from reap_stream.model.opened import OpenedModel
from reap_stream.pruning import Kept, Variant

_PARALLEL: Final = (2, 4, 8)
# FP8 per tensor (static), ModelOpt and compressed-tensors NVFP4: one number for an expert's input.
_ACTIVATION_SCALE: Final = re.compile(r"(?:^|[._])(input_scale(?:_2)?|input_global_scale)$")


def serving_warnings(plan: OutputPlan, hidden: int, block: tuple[int, int]) -> Iterator[str]:
    """What to know before a pruned checkpoint is served.

    Args:
        plan: the checkpoint as it will be written.
        hidden: width of the hidden states.
        block: rows and columns of a block of FP8 weights.
    """
    uneven = [count for count in _PARALLEL if plan.keep % count]
    if uneven:
        yield (
            f"{plan.keep} experts do not divide by {_listed(uneven)}: engines that spread experts "
            "evenly cannot use that many devices for expert parallelism"
        )
    yield from _block_warnings(plan, hidden, block)
    scales = sum(1 for out in plan.tensors.values() if is_activation_scale(out))
    if scales and plan.keep < plan.num_experts:
        yield (
            f"experts carry {scales} static activation scales: engines take the largest of a "
            "layer's experts, so where the expert with the largest goes, the activations of all "
            "others are quantised otherwise than before"
        )


def engine_warnings(model: OpenedModel, variant: Variant) -> list[str]:
    """`serving_warnings` for one target of a job."""
    hidden = int(model.architecture.embedding.weight.shape[-1])
    formats = known_formats(_written_config(model))
    block = next((fmt.block for fmt in formats if isinstance(fmt, Fp8)), DEFAULT_BLOCK)
    return [*serving_warnings(variant.plan, hidden, block), *_mixed_warnings(model, variant)]


def serving_record(
    model: OpenedModel, variants: Sequence[Variant], choices: Sequence[Kept]
) -> dict[str, Any]:
    """What run.json says of serving, for each kept count; see `activation_scale_changes`."""
    record = {}
    with Reader() as reader:
        for variant, kept in zip(variants, choices, strict=True):
            changes = activation_scale_changes(model, variant.plan, kept, reader)
            record[str(variant.target.keep)] = {
                "warnings": engine_warnings(model, variant),
                "activation_scale_changes": {name: list(pair) for name, pair in changes.items()},
            }
    return record


def _written_config(model: OpenedModel) -> dict[str, Any]:
    """config.json with the settings of the weights as written, which need not be the source's."""
    return model.change.seen_on(model.checkpoint).config


def _mixed_warnings(model: OpenedModel, variant: Variant) -> Iterator[str]:
    settings = quantization_settings(_written_config(model))
    mixed = mixed_layers(settings, model.checkpoint.tensors, model.architecture.num_layers)
    if mixed and variant.plan.keep < variant.plan.num_experts:
        more = f" and {len(mixed) - 3} more" if len(mixed) > 3 else ""
        yield (
            f"config.json's quantisation settings do not treat the experts of layers "
            f"{', '.join(map(str, mixed[:3]))}{more} alike: engines ask them of a layer's first "
            "expert alone, and after pruning that may be one of the other kind"
        )


def is_activation_scale(out: OutputTensor) -> bool:
    """Whether a tensor is the static scale of one expert's input."""
    return out.slot is not None and _ACTIVATION_SCALE.search(out.name) is not None


def activation_scale_changes(
    model: OpenedModel,
    plan: OutputPlan,
    kept: Mapping[int, Sequence[int]],
    reader: Reader,
) -> dict[str, tuple[float, float]]:
    """Where the largest static activation scale of a layer's experts goes with its expert.

    Args:
        model: the source.
        plan: the pruned checkpoint.
        kept: kept experts of every layer.
        reader: reads the scales.

    Returns:
        Tensor name, its expert's number masked → the largest before and after.
    """
    origins = {out.origin: out for out in plan.tensors.values() if is_activation_scale(out)}
    values: dict[str, dict[int, float]] = defaultdict(dict)
    layers: dict[str, int] = {}
    for name, role in model.tensor_map.roles.items():
        if role.expert is None or role.component is None or role.layer is None:
            continue
        masked = _with_component(name, role.component, "*")
        if _with_component(name, role.component, "0") in origins:
            values[masked][role.expert] = _scalar(model.checkpoint.tensors[name], reader)
            layers[masked] = role.layer
    changes = {}
    for masked, by_expert in values.items():
        if layers[masked] not in kept:
            continue
        before = max(by_expert.values())
        after = max(by_expert[expert] for expert in kept[layers[masked]])
        if after != before:
            changes[masked] = (before, after)
    return changes


def _block_warnings(plan: OutputPlan, hidden: int, block: tuple[int, int]) -> Iterator[str]:
    """Widths of block-scaled experts that tensor parallelism cannot cut between blocks."""
    for width, length in sorted(set(_block_widths(plan, hidden, block))):
        bad = [count for count in _PARALLEL if width % (count * length)]
        if bad:
            yield (
                f"experts are {width} wide in blocks of {length}: tensor parallelism over "
                f"{_listed(bad)} devices would cut inside a block, which engines refuse or slow "
                "down for; expert parallelism is not concerned"
            )


def _block_widths(
    plan: OutputPlan, hidden: int, block: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """Width of block-scaled expert weights and of a block, along the side tensor parallelism cuts.

    That is the experts' own width: rows of up and gate projections, columns of down projections.
    """
    for name, out in plan.tensors.items():
        # Not by the slot: what is computed has none.
        one_expert = out.layer is not None and out.dim is None
        if not one_expert or out.dtype != "F8_E4M3" or len(out.shape) != 2:
            continue
        scale = plan.tensors.get(f"{name}_scale_inv") or plan.tensors.get(f"{name}_scale")
        blocks = (-(-out.shape[0] // block[0]), -(-out.shape[1] // block[1]))
        if scale is not None and scale.shape == blocks != (1, 1):
            side = 0 if out.shape[1] == hidden else 1
            yield out.shape[side], block[side]


def _listed(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))


def _with_component(name: str, component: int, text: str) -> str:
    parts = name.split(".")
    parts[component] = text
    return ".".join(parts)


def _scalar(ref: TensorRef, reader: Reader) -> float:
    raw = np.empty(ref.nbytes, dtype=np.uint8)
    reader.read_into([(ref, 0, ref.nbytes, raw)])
    if ref.dtype == "BF16":
        return float((raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).max())
    return float(raw.view({"F32": np.float32, "F16": np.float16}[ref.dtype]).max())
