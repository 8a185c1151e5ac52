"""Which checkpoint tensor feeds which parameter, and what pruning does to each tensor.

Checkpoints name experts in two ways: a tensor for each expert, or one tensor that holds all.
Which it is follows from how many tensors transformers' key mapping sends to a parameter that
pruning slices. Tensors transformers does not load are judged by their neighbours (see
`companions`), and a next-token-prediction (MTP) layer is sliced as the decoder layer whose names
it repeats.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from reap_stream.checkpoint.refs import WHOLE, Role, TensorRef
from reap_stream.checkpoint.spare_experts import SpareExpert
from reap_stream.checkpoint.token_tables import TokenTable
from reap_stream.errors import UnsupportedError
from reap_stream.formats import Weight
from reap_stream.model.architecture import Architecture
from reap_stream.model.companions import adopt_companions, refuse_unclaimed_experts
from reap_stream.model.hash_routing import token_tables
from reap_stream.model.mtp import map_mtp
from reap_stream.model.transformers_api import KeyMap, get_tensor
from reap_stream.model.unknown import unknown_weights


@dataclass(frozen=True, slots=True)
class Feed:
    """What a parameter is made of.

    Attributes:
        target: the parameter (the first, where a converter makes several).
        groups: (converter pattern or None, weights in checkpoint order).
        beside: further parameters that are made of the same.
    """

    target: str
    groups: tuple[tuple[str | None, tuple[Weight, ...]], ...]
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorMap:
    """The checkpoint seen from the model.

    Attributes:
        feeds: parameter → what it is made of.
        roles: every tensor of the checkpoint → what pruning does to it.
        mtp_layers: layer numbers of next-token-prediction layers, as `Role.layer` has them.
        mtp_tensors: names of all tensors of those layers.
        mtp_uneven: those of these layers that have another number of experts than the decoder's
            → that number; they are left whole.
    """

    feeds: dict[str, Feed]
    roles: dict[str, Role]
    mtp_layers: tuple[int, ...]
    mtp_tensors: frozenset[str]
    mtp_uneven: Mapping[int, int] = field(default_factory=dict)


def map_tensors(
    architecture: Architecture,
    keys: KeyMap,
    tensors: Mapping[str, TensorRef],
    weights: Mapping[str, Weight],
) -> TensorMap:
    """Maps a checkpoint onto a model.

    Raises:
        UnsupportedError: a parameter has no tensor, an experts tensor has no known layout, or
            a tensor that no parameter takes seems to hold experts.
    """
    feeds, taken = collect_feeds(keys, {**weights, **unknown_weights(keys, tensors, weights)})
    _check_complete(architecture, feeds)
    roles = _set_spares_aside(architecture, feeds)
    for target, feed in feeds.items():
        if target in architecture.sliced:
            roles.update(_slice_roles(architecture, keys, feed))
    adopt_companions(roles, tensors)
    roles.update(_table_roles(architecture, feeds))
    fed = (weight for feed in feeds.values() for _, group in feed.groups for weight in group)
    weight_names = {next(iter(weight.parts.values())).name for weight in fed}
    mtp = map_mtp(architecture, roles, tensors, taken, weight_names)
    # A prediction layer may be stored in another format than its twin, with scales of its own.
    adopt_companions(roles, tensors)
    left_whole = {name for name, (layer, _) in mtp.places.items() if layer in mtp.uneven}
    claimed = taken | roles.keys() | left_whole
    unclaimed = {name: ref for name, ref in tensors.items() if name not in claimed}
    refuse_unclaimed_experts(architecture, unclaimed, mtp.places.keys())
    for name in tensors:
        roles.setdefault(name, WHOLE)
    layers = sorted({layer for layer, _ in mtp.places.values()})
    return TensorMap(feeds, roles, tuple(layers), frozenset(mtp.places), mtp.uneven)


def natural_key(name: str) -> list[tuple[int, str, int]]:
    """Sort key under which expert 10 follows expert 9, and `shard_10` follows `shard_9`."""
    return [
        (0, "", int(part)) if part.isdigit() else (1, *_split_number(part))
        for part in name.split(".")
    ]


def _split_number(part: str) -> tuple[str, int]:
    text = part.rstrip("0123456789")
    return text, int(part[len(text) :] or -1)


def collect_feeds(keys: KeyMap, weights: Mapping[str, Weight]) -> tuple[dict[str, Feed], set[str]]:
    """Parameter → what it is made of, and the names of all tensors that are used."""
    found: dict[str, dict[str | None, list[Weight]]] = defaultdict(lambda: defaultdict(list))
    taken: set[str] = set()
    for name in sorted(weights, key=natural_key):
        mapped = keys.target(name)
        if mapped is not None:
            target, pattern = mapped
            found[target][pattern].append(weights[name])
            taken.update(ref.name for ref in weights[name].parts.values())
    feeds = {}
    for target, groups in found.items():
        patterns = list(groups)
        first = patterns[0]
        if first is not None:
            order = keys.source_patterns(first)
            patterns.sort(key=lambda p: order.index(p) if p in order else -1)
        beside = () if first is None else keys.made_beside(target, first)
        feeds[target] = Feed(target, tuple((p, tuple(groups[p])) for p in patterns), beside)
    return feeds, taken


def unfed_parameters(architecture: Architecture, feeds: Mapping[str, Feed]) -> list[str]:
    """Parameters and saved buffers of the model for which the checkpoint has no tensor."""
    made = set(feeds) | architecture.tied
    made.update(name for feed in feeds.values() for name in feed.beside)
    return [name for name in architecture.model.state_dict() if name not in made]


def _check_complete(architecture: Architecture, feeds: Mapping[str, Feed]) -> None:
    missing = [
        name for name in unfed_parameters(architecture, feeds) if name in architecture.sliced
    ]
    if missing:
        message = (
            f"the checkpoint has no tensor for {missing[0]!r} and {len(missing) - 1} other "
            "parameters that hold experts, or none in a format that is known"
        )
        raise UnsupportedError(message)


def _slice_roles(architecture: Architecture, keys: KeyMap, feed: Feed) -> dict[str, Role]:
    layer = architecture.layer_of(feed.target)
    if layer is None:
        message = f"{feed.target} depends on the number of experts but lies in no decoder layer"
        raise UnsupportedError(message)
    roles: dict[str, Role] = {}
    for pattern, group in feed.groups:
        if len(group) == architecture.num_experts:
            roles.update(_member_roles(architecture, layer, group))
        elif len(group) == 1:
            dim = _source_dim(architecture, keys, feed, pattern)
            role = Role(layer=layer, dim=dim, extra=architecture.extras.get(feed.target, 0))
            roles.update({ref.name: role for ref in group[0].parts.values()})
        else:
            message = (
                f"{feed.target} is fed by {len(group)} tensors like {group[0].name!r}; expected "
                f"1 or one for each of {architecture.num_experts} experts"
            )
            raise UnsupportedError(message)
    return roles


def _set_spares_aside(architecture: Architecture, feeds: dict[str, Feed]) -> dict[str, Role]:
    """Takes tensors of experts behind the layer's own out of the feeds; gives their roles."""
    count, roles = architecture.num_experts, {}
    for target, extra in architecture.extras.items():
        feed = feeds.get(target)
        if feed is None or len(feed.groups[0][1]) != count + extra:
            continue
        for _, group in feed.groups:
            component = _varying(group)[0]
            for behind, weight in enumerate(group[count:]):
                for ref in weight.parts.values():
                    # Of a layer, for the name follows from how many experts of it stay.
                    recipe = SpareExpert(ref, component, behind)
                    roles[ref.name] = Role(layer=architecture.layer_of(target), recipe=recipe)
        groups = tuple((pattern, group[:count]) for pattern, group in feed.groups)
        feeds[target] = Feed(target, groups)
    return roles


def _table_roles(architecture: Architecture, feeds: Mapping[str, Feed]) -> dict[str, Role]:
    """Tables of tokens and their experts, which name those by number."""
    roles = {}
    for name, layer in token_tables(architecture).items():
        if name in feeds:
            ref = feeds[name].groups[0][1][0].parts["weight"]
            table = TokenTable(ref, architecture.num_experts)
            roles[ref.name] = Role(layer=layer, recipe=table)
    return roles


def _member_roles(
    architecture: Architecture, layer: int, group: tuple[Weight, ...]
) -> dict[str, Role]:
    varying = _varying(group)
    names = [weight.name.split(".") for weight in group]
    numbers = [parts[varying[0]] for parts in names] if len(varying) == 1 else []
    if numbers != [str(expert) for expert in range(architecture.num_experts)]:
        message = (
            f"tensors {group[0].name!r} to {group[-1].name!r} are not numbered 0 to "
            f"{architecture.num_experts - 1}"
        )
        raise UnsupportedError(message)
    return {
        ref.name: Role(layer=layer, expert=expert, component=varying[0])
        for expert, weight in enumerate(group)
        for ref in weight.parts.values()
    }


def _varying(group: tuple[Weight, ...]) -> list[int]:
    """Positions in dotted names at which the names of weights differ."""
    split = [weight.name.split(".") for weight in group]
    return [i for i, parts in enumerate(zip(*split, strict=True)) if len(set(parts)) > 1]


def _source_dim(architecture: Architecture, keys: KeyMap, feed: Feed, pattern: str | None) -> int:
    """The dimension of a fused source tensor along which its experts lie."""
    dim = architecture.sliced[feed.target]
    if pattern is None:
        return dim
    full = get_tensor(architecture.model, feed.target).shape
    wanted = (*full[:dim], 1, *full[dim + 1 :])
    for candidate in range(len(feed.groups[0][1][0].shape)):
        made = _converted_shape(keys, feed, candidate, (architecture.num_experts, dim))
        if made == wanted:
            return candidate
    message = f"{feed.target}: no dimension of its source tensors holds the experts"
    raise UnsupportedError(message)


def _converted_shape(
    keys: KeyMap, feed: Feed, dim: int, experts: tuple[int, int]
) -> tuple[int, ...] | None:
    """The parameter's shape if `dim` held one expert; `experts`: their number, dimension in it."""
    num_experts, target_dim = experts
    groups = []
    for pattern, group in feed.groups:
        shape = list(group[0].shape)
        if dim >= len(shape) or shape[dim] != num_experts:
            return None
        shape[dim] = 1
        groups.append((pattern, [torch.empty(shape, device="meta")]))
    try:
        made = keys.convert(feed.target, groups, one_along=target_dim)
        return tuple(made[feed.target].shape)
    except (RuntimeError, ValueError, KeyError, IndexError):
        return None
