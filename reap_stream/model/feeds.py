"""What each layer of a model is made of, divided by how it is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats import Weight
from reap_stream.model.architecture import Architecture
from reap_stream.model.roles import Feed, TensorMap
from reap_stream.model.row_lookup import row_weights
from reap_stream.model.transformers_api import get_tensor


@dataclass(frozen=True, slots=True)
class LayerFeeds:
    """What one layer is made of.

    Attributes:
        dense: feeds of everything but the routed experts and tables.
        experts: experts parameter leaf → feed; empty in a dense layer.
        dims: experts parameter leaf → dimension of the experts.
        each: experts parameter leaf → entries of one expert along it.
        tables: embedding matrices by name, of which only the rows looked up are read.
    """

    dense: tuple[Feed, ...]
    experts: dict[str, Feed]
    dims: dict[str, int]
    each: dict[str, int]
    tables: dict[str, tuple[Weight, ...]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's tensors, of which one may feed several parameters."""
        feeds = [*self.dense, *self.experts.values()]
        weights = [weight for _, group in _groups(feeds) for weight in group]
        weights += [weight for rows in self.tables.values() for weight in rows]
        refs = {ref.name: ref for weight in weights for ref in weight.parts.values()}
        return sum(ref.nbytes for ref in refs.values())


def layer_feeds(architecture: Architecture, tensor_map: TensorMap) -> list[LayerFeeds]:
    """Divides a model's feeds among its layers, in order."""
    count = architecture.num_layers
    dense: list[list[Feed]] = [[] for _ in range(count)]
    experts: list[dict[str, Feed]] = [{} for _ in range(count)]
    tables: list[dict[str, tuple[Weight, ...]]] = [{} for _ in range(count)]
    for target, feed in tensor_map.feeds.items():
        layer = architecture.layer_of(target)
        if layer is None:
            continue
        module, _, leaf = target.rpartition(".")
        rows = _table_rows(architecture, feed)
        if module == architecture.experts_paths.get(layer) and target in architecture.sliced:
            experts[layer][leaf] = feed
        elif rows is not None:
            tables[layer][target] = rows
        else:
            dense[layer].append(feed)
    return [
        LayerFeeds(
            tuple(dense[layer]),
            own,
            {leaf: architecture.sliced[feed.target] for leaf, feed in own.items()},
            {leaf: architecture.entries_of_each(feed.target) for leaf, feed in own.items()},
            tables[layer],
        )
        for layer, own in enumerate(experts)
    ]


def _table_rows(architecture: Architecture, feed: Feed) -> tuple[Weight, ...] | None:
    """The weights of an embedding matrix; None for all other parameters."""
    module = architecture.model.get_submodule(feed.target.rpartition(".")[0])
    if not isinstance(module, nn.Embedding):
        return None
    return row_weights(feed, get_tensor(architecture.model, feed.target).shape)


def feed_refs(feeds: Iterable[Feed]) -> Iterator[TensorRef]:
    """The tensors that feeds are made of."""
    for _, weights in _groups(feeds):
        for weight in weights:
            yield from weight.parts.values()


def _groups(feeds: Iterable[Feed]) -> Iterator[tuple[str | None, tuple[Weight, ...]]]:
    for feed in feeds:
        yield from feed.groups
