"""Audits a written checkpoint by what it says of itself, as an engine would read it.

Engines load damaged checkpoints without a word: a missing FP8 scale stays 1, a missing expert is
whatever the memory held. So before a checkpoint is published it is opened as any other, from its
own headers and its own config.json: experts are numbered from 0 without a hole and all have the
same tensors, every parameter of the model that config.json describes finds a weight of its shape
that can be decoded, no tensor is left that nothing claims, and config.json agrees with itself.
What the source already has wrong is not the pruning's fault and is let pass.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from reap_stream.checkpoint.configedit import mtp_layer_count
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.checkpoint.source import CONFIG_NAME, open_checkpoint
from reap_stream.checkpoint.spare_experts import SpareExpert
from reap_stream.checkpoint.strict_json import shown
from reap_stream.errors import ReapStreamError, UsageError
from reap_stream.model.opened import OpenedModel, forward_faults, open_model
from reap_stream.scoring.selection import check_routing

MAX_FAULTS: Final = 20
"""Faults that are listed; more say nothing more."""

_EXPERT: Final = re.compile(r"^(.*?\.experts)\.(\d+)\.(.+)$")
_NAMED_EXPERT: Final = re.compile(r"\.experts\.(\d+)(?:\.|$)")


def audit(directory: Path, source: OpenedModel) -> list[str]:
    """What is wrong with a written checkpoint, up to 20 faults; empty if nothing is.

    Args:
        directory: the written checkpoint.
        source: what it was pruned from; its own faults are not held against the output.
    """
    try:
        tensors = open_checkpoint(directory).tensors
        spares = _spares(source)
        before = set(_numbering(source.checkpoint.tensors, spares))
        faults = [text for text in _numbering(tensors, spares) if text not in before]
        # Experts out of order are named better here than by what follows from them.
        if not faults:
            written = open_model(directory, trust_remote_code=source.trust_remote_code)
            faults.extend(_model_faults(written, source))
    except ReapStreamError as error:
        faults = [str(error)]
    return faults[:MAX_FAULTS]


def _spares(source: OpenedModel) -> dict[str, int]:
    """Experts block → experts numbered behind its own, which need not have all tensors."""
    found: dict[str, set[int]] = defaultdict(set)
    for name, role in source.tensor_map.roles.items():
        match = _EXPERT.match(name)
        if match and isinstance(role.recipe, SpareExpert):
            found[match[1]].add(int(match[2]))
    return {block: len(numbers) for block, numbers in found.items()}


def _numbering(tensors: Mapping[str, TensorRef], spares: Mapping[str, int]) -> Iterator[str]:
    """Faults in the names of tensors that belong to one expert each, whatever their format."""
    blocks: dict[str, dict[int, dict[str, TensorRef]]] = defaultdict(lambda: defaultdict(dict))
    for name, ref in tensors.items():
        match = _EXPERT.match(name)
        if match:
            blocks[match[1]][int(match[2])][match[3]] = ref
    for block, experts in blocks.items():
        if experts.keys() != set(range(len(experts))):
            missing = next(i for i in range(len(experts) + 1) if i not in experts)
            yield f"{block}: experts are not numbered 0 to {len(experts) - 1}: {missing} is missing"
            continue
        own = len(experts) - spares.get(block, 0)
        yield from _uneven(block, {number: experts[number] for number in range(own)})


def _uneven(block: str, experts: Mapping[int, Mapping[str, TensorRef]]) -> Iterator[str]:
    everything = {suffix: ref for expert in experts.values() for suffix, ref in expert.items()}
    for number, expert in experts.items():
        for suffix, other in everything.items():
            ref = expert.get(suffix)
            if ref is None:
                yield f"{block}.{number}.{suffix} is missing, other experts have it"
            elif (ref.dtype, ref.shape) != (other.dtype, other.shape):
                yield (
                    f"{block}.{number}.{suffix} is {ref.dtype} {list(ref.shape)}, "
                    f"{other.name} is {other.dtype} {list(other.shape)}"
                )


def _model_faults(written: OpenedModel, source: OpenedModel) -> Iterator[str]:
    if next(forward_faults(source), None) is None:
        yield from forward_faults(written)
    for name in sorted(_unclaimed(written) - _unclaimed(source)):
        ref = written.checkpoint.tensors[name]
        yield f"{ref.file}: tensor {name!r} is claimed by no parameter of {CONFIG_NAME}'s model"
    yield from _mtp_faults(written, source)
    yield from _config_faults(written, source)


def _unclaimed(model: OpenedModel) -> set[str]:
    """Tensors that no parameter, no prediction layer and no expert's weight accounts for."""
    mapped = model.tensor_map
    claimed = set(mapped.mtp_tensors)
    for feed in mapped.feeds.values():
        weights = [weight for _, group in feed.groups for weight in group]
        claimed.update(ref.name for weight in weights for ref in weight.parts.values())
    claimed.update(name for name, role in mapped.roles.items() if role.layer is not None)
    return set(model.checkpoint.tensors) - claimed


def _mtp_faults(written: OpenedModel, source: OpenedModel) -> Iterator[str]:
    """Prediction layers have as many experts as the decoder's, or were left as they were."""
    before = source.tensor_map.mtp_uneven
    for layer, count in written.tensor_map.mtp_uneven.items():
        left = before.get(layer, source.architecture.num_experts)
        if count != left:
            yield (
                f"{written.checkpoint.directory}: next-token-prediction layer {layer} has {count} "
                f"experts, neither {written.architecture.num_experts} as the decoder's layers nor "
                f"the source's {left}"
            )


def _config_faults(written: OpenedModel, source: OpenedModel) -> Iterator[str]:
    path = written.checkpoint.directory / CONFIG_NAME
    architecture = written.architecture
    routing = architecture.routing
    try:
        check_routing(
            architecture.num_experts,
            routing.experts_per_token,
            routing.groups,
            routing.topk_groups,
        )
    except UsageError as error:
        yield f"{path}: {error}"
    for text in _texts(written.checkpoint.config):
        match = _NAMED_EXPERT.search(text)
        if match and int(match[1]) >= architecture.num_experts:
            yield f"{path}: {shown(text)} names an expert past the last of {architecture.num_experts}"
    if _mtp_agrees(source) and not _mtp_agrees(written):
        said, found = mtp_layer_count(written.checkpoint.config), written.tensor_map.mtp_layers
        yield (
            f"{path}: speaks of {said} next-token-prediction layers, the checkpoint holds "
            f"{len(found)}"
        )


def _mtp_agrees(model: OpenedModel) -> bool:
    return bool(mtp_layer_count(model.checkpoint.config)) == bool(model.tensor_map.mtp_layers)


def _texts(value: Any) -> Iterator[str]:
    """Every key and every text of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield key
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)
