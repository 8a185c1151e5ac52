"""What fetching a model from the Hub takes, and whether the disks have the room, before it begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from reap_stream.checkpoint.disk import free_nbytes, on_one_disk
from reap_stream.checkpoint.layout import OutputPlan
from reap_stream.checkpoint.providers import provider_of
from reap_stream.checkpoint.shard_uses import ShardOrder
from reap_stream.errors import NoRoomError, UnsupportedError
from reap_stream.model.opened import OpenedModel
from reap_stream.serving import is_activation_scale


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


def check_download(
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
    provider = provider_of(model.checkpoint.directory)
    if provider is not None and provider.evicts:
        _check_evictable(plans)
    written = sum(plan.nbytes for plan in plans)
    _check_room([*_wanted([model], [order]), *([(output, written, "")] if provider else [])])


def check_downloads(models: Sequence[OpenedModel], orders: Sequence[ShardOrder]) -> None:
    """As `check_download`, of several models from which nothing is written.

    Raises:
        NoRoomError: a disk holds less than their shards need.
    """
    _check_room(list(_wanted(models, orders)))


def _wanted(
    models: Sequence[OpenedModel], orders: Sequence[ShardOrder]
) -> Iterator[tuple[Path, int, str]]:
    """Where shards will lie, how many bytes of them at a time, and how to need less."""
    for model, order in zip(models, orders, strict=True):
        provider = provider_of(model.checkpoint.directory)
        download = read_download(model, order)
        if provider is None or download is None:
            continue
        nbytes = download.evicted_peak_bytes if provider.evicts else download.bytes
        advice = "" if provider.evicts else "give --evict, "
        yield provider.place, nbytes, advice


def _check_room(wanted: Sequence[tuple[Path, int, str]]) -> None:
    """Refuses what is too much for a disk, all that goes there together."""
    for place, _, _ in wanted:
        here = [entry for entry in wanted if on_one_disk(entry[0], place)]
        needed, free = sum(nbytes for _, nbytes, _ in here), free_nbytes(place)
        if free < needed:
            advice = max(advice for *_, advice in here)
            message = (
                f"{place}: the disk has {free} bytes free, shards from the Hub and what is written "
                f"beside them need {needed}: {advice}make room or choose another disk"
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
