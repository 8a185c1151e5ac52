"""When each shard of a source is read, so that it can be fetched late and deleted early.

A pass reads the layers one after the other; a step is a layer's number. What stands outside the
layers (embeddings, the last norm) is read from the first step on. What is written but not run
(further towers, the head) is read at the very end, in a step of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reap_stream.checkpoint.disk import free_nbytes, on_one_disk
from reap_stream.checkpoint.layout import OutputPlan
from reap_stream.checkpoint.providers import prefetch_files, provider_of, release_files
from reap_stream.errors import NoRoomError, UnsupportedError
from reap_stream.model.feeds import feed_refs
from reap_stream.model.mtp_head import MtpHead
from reap_stream.model.opened import OpenedModel
from reap_stream.serving import is_activation_scale


@dataclass(frozen=True, slots=True)
class Uses:
    """The first and the last step in which a shard is read."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ShardOrder:
    """When each shard is read.

    Attributes:
        uses: by shard; those that nothing reads are left out.
        end: the step behind the layers.
    """

    uses: Mapping[Path, Uses]
    end: int

    def done(self, step: int) -> None:
        """Lets go of shards that are not read after a step, and sends for those of the next but one."""
        release_files(shard for shard, uses in self.uses.items() if uses.last <= step)
        prefetch_files(shard for shard, uses in self.uses.items() if uses.first == step + 2)

    def peak_nbytes(self, nbytes: Mapping[Path, int]) -> int:
        """The most bytes of shards that are on the disk at a time.

        While a step runs the shards of the next one are fetched already.

        Args:
            nbytes: of each shard what fetching it takes.
        """
        return max(
            (
                sum(
                    nbytes[shard]
                    for shard, uses in self.uses.items()
                    if uses.first <= step + 1 and uses.last >= step
                )
                for step in range(self.end + 1)
            ),
            default=0,
        )


def shard_order(model: OpenedModel, head: MtpHead | None, *, writes: bool) -> ShardOrder:
    """Says when a pass over a model reads its shards.

    Args:
        model: the model.
        head: its next-token-prediction layers, where they are run.
        writes: a pruned checkpoint is written, for which every tensor is read.
    """
    layers = dict(_layer_tensors(model, head))
    around = set(_tensors_around(model))
    end = 1 + max(
        [model.architecture.num_layers - 1, *(layer for layer in layers.values())], default=0
    )
    found: dict[Path, list[int]] = {}
    for name, ref in model.checkpoint.tensors.items():
        steps = found.setdefault(ref.file, [])
        if name in around:
            steps += [0, end]
        elif name in layers:
            steps.append(layers[name])
        elif writes:
            steps.append(end)
    uses = {shard: Uses(min(steps), max(steps)) for shard, steps in found.items() if steps}
    return ShardOrder(uses, end)


@dataclass(frozen=True, slots=True)
class Download:
    """What fetching a source takes.

    Attributes:
        bytes: of the shards that are not on the disk yet and will be read.
        evicted_peak_bytes: the most of them on the disk at a time with ``--evict``.
    """

    bytes: int
    evicted_peak_bytes: int


def read_download(model: OpenedModel, order: ShardOrder) -> Download | None:
    """What fetching takes; None where nothing is fetched, since the source is a directory."""
    provider = provider_of(model.checkpoint.directory)
    if provider is None:
        return None
    nbytes = {
        shard: provider.remote_nbytes(shard.relative_to(provider.directory).as_posix())
        for shard in order.uses
    }
    return Download(sum(nbytes.values()), order.peak_nbytes(nbytes))


def check_source(
    model: OpenedModel, order: ShardOrder, output: Path, plans: Sequence[OutputPlan] = ()
) -> None:
    """Refuses a source that could not be fetched to the end, before any of it is.

    Args:
        model: the source.
        order: when its shards are read.
        output: where results go.
        plans: what is still to be written there.

    Raises:
        NoRoomError: the disk holds less than shards and results need.
        UnsupportedError: shards would be deleted that are read again for a few numbers.
    """
    provider, download = provider_of(model.checkpoint.directory), read_download(model, order)
    if provider is None or download is None:
        return
    if provider.evicts:
        _check_evictable(plans)
    where = output if provider.evicts else provider.directory
    needed = download.evicted_peak_bytes if provider.evicts else download.bytes
    if on_one_disk(where, output):
        needed += sum(plan.nbytes for plan in plans)
    free = free_nbytes(where)
    if free < needed:
        advice = "" if provider.evicts else ", give --evict"
        message = (
            f"{where}: the disk has {free} bytes free, shards of {provider.origin} and what is "
            f"written beside them need {needed}: make room{advice} or choose another disk"
        )
        raise NoRoomError(message)


def _check_evictable(plans: Sequence[OutputPlan]) -> None:
    for plan in plans:
        scale = next((out for out in plan.tensors.values() if is_activation_scale(out)), None)
        if scale is not None:
            message = (
                f"{scale.name!r} is a static activation scale, and those of all layers are read "
                "again when the last is done: leave out --evict"
            )
            raise UnsupportedError(message)


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
