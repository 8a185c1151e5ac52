"""When each job reads each shard of a source, so that shards can be fetched late and deleted early.

A pass reads the layers one after the other; a step is a layer's number. What stands outside the
layers (embeddings, the last norm, the head) is held from the first step on. What is written but
not run (further towers) is read at the very end, in a step of its own.

Jobs that copy or compare go the same way through the layers, and take what stands outside of them
along while its shard is there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from reap_stream.checkpoint.refs import WHOLE, Role
from reap_stream.checkpoint.shard_uses import CopyOrder, ShardOrder
from reap_stream.model.feeds import feed_refs
from reap_stream.model.mtp_head import MtpHead
from reap_stream.model.opened import OpenedModel
from reap_stream.pruning import source_facts


def shard_order(
    model: OpenedModel, head: MtpHead | None, *, writes: bool, mtp: str | None = None
) -> ShardOrder:
    """Says when a pass over a model reads its shards.

    Args:
        model: the model.
        head: its next-token-prediction layers, where they are run.
        writes: a pruned checkpoint is written, for which every tensor is read.
        mtp: what happens to next-token-prediction layers; those that are left out are not read.
    """
    dropped = model.tensor_map.mtp_tensors if mtp == "drop" else frozenset()
    layers = dict(_layer_tensors(model, head))
    around = set(_tensors_around(model))
    end = _end(model, layers.values())

    def steps() -> Iterator[tuple[Path, int]]:
        for name, ref in model.checkpoint.tensors.items():
            if name in around:
                yield ref.file, 0
                yield ref.file, end
            elif name in layers:
                yield ref.file, layers[name]
            elif writes and name not in dropped:
                yield ref.file, end

    return ShardOrder.of(steps(), end)


def copy_order(model: OpenedModel, mtp: str | None) -> CopyOrder:
    """Says when a job that runs nothing reads what is written: layer by layer, each shard once.

    Args:
        model: the model, with recipes if weights are written in another format.
        mtp: what happens to next-token-prediction layers.
    """
    facts = source_facts(model, mtp)
    tensors = {n: ref for n, ref in model.checkpoint.tensors.items() if n not in facts.dropped}
    layers = dict(_layer_tensors(model, None))
    # Prediction layers that are not scored wait for the last decoder layer's choice.
    chosen = {*model.architecture.moe_layers, *(model.mtp_kept_layers() if mtp == "score" else ())}
    for name, role in facts.roles.items():
        if role.layer in chosen:
            layers[name] = role.layer
    places = {name: _place(name, facts.roles) for name in tensors}
    end = _end(model, layers.values())
    # What belongs to no layer comes along with the last layer of its shard.
    last: dict[Path, int] = {}
    for name, ref in tensors.items():
        if name in layers:
            last[ref.file] = max(layers[name], last.get(ref.file, 0))
    waits = {name for name, role in facts.roles.items() if role.layer is not None}
    steps = {
        name: layers.get(place, end if place in waits else last.get(tensors[place].file, end))
        for name, place in places.items()
    }
    whole: dict[int, list[str]] = defaultdict(list)
    for name, step in steps.items():
        if facts.roles.get(name, WHOLE).layer is None and places[name] == name:
            whole[step].append(name)
    reads = ((ref.file, steps[name]) for name, ref in tensors.items())
    return CopyOrder(ShardOrder.of(reads, end), steps, whole)


def _place(name: str, roles: Mapping[str, Role]) -> str:
    """The tensor in whose stead a tensor is written: what is computed of several is written once."""
    recipe = roles.get(name, WHOLE).recipe
    return name if recipe is None else recipe.place


def _end(model: OpenedModel, layers: Iterable[int]) -> int:
    """The step behind all layers."""
    return 1 + max([model.architecture.num_layers - 1, *layers])


def _layer_tensors(model: OpenedModel, head: MtpHead | None) -> Iterator[tuple[str, int]]:
    """Tensors that a layer's step reads and, where a checkpoint is written, writes."""
    for target, feed in model.tensor_map.feeds.items():
        layer = model.architecture.layer_of(target)
        if layer is not None:
            yield from ((ref.name, layer) for ref in feed_refs([feed]))
    if head is None:
        return
    for target, feed in head.opened.tensor_map.feeds.items():
        layer = head.opened.architecture.layer_of(target)
        if layer is not None:
            yield from ((ref.name, head.first + layer) for ref in feed_refs([feed]))


def _tensors_around(model: OpenedModel) -> Iterator[str]:
    """Tensors of parameters outside the layers that text runs through."""
    architecture = model.architecture
    for target, feed in model.tensor_map.feeds.items():
        if architecture.layer_of(target) is None and architecture.runs_on_text(target):
            yield from (ref.name for ref in feed_refs([feed]))
