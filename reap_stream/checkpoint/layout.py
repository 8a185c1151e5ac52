"""Where every byte of a pruned checkpoint will lie, known before a weight is read.

Serving engines read one expert count from config.json, so every Mixture-of-Experts layer keeps the
same number of experts. Hence name, dtype, shape, shard and offset of every output tensor follow
from the source's headers and that number alone; only *which* source bytes go there waits for the
scores. Nothing here touches a file.

    source shard   | attn | experts.0 | experts.1 | experts.2 | experts.3 | router (4 rows) |
    kept [1, 3]              gone     |     └──────────┐  gone     │ ┌───────┘  rows 1, 3
    output shard   | attn | experts.0 = source expert 1 | experts.1 = source expert 3 | router (2) |
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from reap_stream.checkpoint.dtypes import tensor_nbytes
from reap_stream.checkpoint.header import render_header
from reap_stream.checkpoint.layout_checks import check_experts, check_names, masked
from reap_stream.checkpoint.refs import WHOLE
from reap_stream.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from reap_stream.checkpoint.recipes import Recipe
    from reap_stream.checkpoint.refs import Role, TensorRef

MAX_SHARD_NBYTES: Final = 5 * 10**9
"""Default limit of a shard's tensor data, as the Hub's own libraries have it."""

_METADATA: Final = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the pruned checkpoint.

    Attributes:
        name: key in the pruned checkpoint.
        dtype: safetensors dtype tag.
        shape: logical shape after pruning.
        nbytes: length in bytes after pruning.
        shard: number of its shard in `OutputPlan.shards`.
        offset: first byte, counted from the start of its shard's file.
        origin: the source tensor it comes from; for a tensor of one expert, expert 0's counterpart;
            for a computed one, the source tensor in whose place it lies.
        layer: layer whose kept experts decide the bytes; None for a tensor copied whole.
        slot: new number of the expert; None for all other tensors.
        dim: dimension along which the experts lie; None for all other tensors.
        extra: entries along `dim` behind those of the experts, as `Role.extra`.
        recipe: computes the bytes; None where they are the source's (see `pieces`).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    shard: int
    offset: int
    origin: str
    layer: int | None = None
    slot: int | None = None
    dim: int | None = None
    extra: int = 0
    recipe: Recipe | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One file of the pruned checkpoint: its header as it will be written, and its whole length."""

    filename: str
    header: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """The whole pruned checkpoint.

    Attributes:
        keep: experts kept in every layer.
        num_experts: experts in every layer of the source.
        shards: the files, in order.
        tensors: every tensor by its new name, in the order of the files' bytes.
        total_size: bytes of all tensors, headers left out (the index's key of that name).
    """

    keep: int
    num_experts: int
    shards: tuple[ShardPlan, ...]
    tensors: dict[str, OutputTensor]
    total_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of all shards on disk, headers counted."""
        return sum(shard.nbytes for shard in self.shards)


def plan_layout(
    tensors: Mapping[str, TensorRef],
    roles: Mapping[str, Role],
    num_experts: int,
    keep: int,
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
    dropped: frozenset[str] = frozenset(),
) -> OutputPlan:
    """Lay out the pruned checkpoint, in the order in which the source holds its bytes.

    Args:
        tensors: the source's tensors by name.
        roles: what pruning does to each; a tensor without a role is copied whole.
        num_experts: experts in every layer of the source.
        keep: experts to keep in every layer.
        max_shard_nbytes: most bytes of tensor data in a shard; a larger tensor has one of its own.
        dropped: source tensors left out (those of next-token-prediction layers, if unwanted).

    Raises:
        UsageError: `keep` is not in 1..num_experts, or the shard limit is not positive.
        UnsupportedError: the experts of a layer are incomplete or not alike, a dimension said to
            hold the experts does not, or a computed tensor has the name of another.
    """
    if not 1 <= keep <= num_experts:
        raise UsageError(f"cannot keep {keep} of {num_experts} experts: give 1 to {num_experts}")
    if max_shard_nbytes < 1:
        raise UsageError(f"a shard cannot hold {max_shard_nbytes} bytes: give a positive number")
    remaining = [ref for name, ref in tensors.items() if name not in dropped]
    if not remaining:
        raise UnsupportedError("the checkpoint holds no tensor to write")
    origins = check_experts(remaining, roles, num_experts)
    remaining.sort(key=lambda ref: (str(ref.file), ref.offset, ref.name))
    unplaced: list[OutputTensor] = []
    for ref in remaining:
        role = roles.get(ref.name, WHOLE)
        if role.recipe is not None:
            unplaced += _computed(ref, role, role.recipe, keep)
        elif out := _pruned(ref, role, origins, (num_experts, keep)):
            unplaced.append(out)
    check_names(unplaced)
    return _place(unplaced, num_experts, keep, max_shard_nbytes)


def index_json(plan: OutputPlan) -> dict[str, Any]:
    """Content of ``model.safetensors.index.json``."""
    weight_map = {name: plan.shards[out.shard].filename for name, out in plan.tensors.items()}
    return {"metadata": {"total_size": plan.total_size}, "weight_map": weight_map}


def layer_tensors(plan: OutputPlan) -> dict[int | None, list[OutputTensor]]:
    """The output tensors by the layer whose kept experts decide them; None: copied whole."""
    groups: dict[int | None, list[OutputTensor]] = defaultdict(list)
    for out in plan.tensors.values():
        groups[out.layer].append(out)
    return dict(groups)


def origin_tensors(plan: OutputPlan) -> dict[str, list[OutputTensor]]:
    """The output tensors by the source tensor in whose place they lie, `OutputTensor.origin`."""
    groups: dict[str, list[OutputTensor]] = defaultdict(list)
    for out in plan.tensors.values():
        groups[out.origin].append(out)
    return dict(groups)


def _pruned(
    ref: TensorRef,
    role: Role,
    origins: Mapping[tuple[int | None, str], str],
    counts: tuple[int, int],
) -> OutputTensor | None:
    """The output tensor that takes a source tensor's place, not placed yet; None: its place goes.

    Slot j stands where the source has expert j, under the name the source gives expert j.
    """
    num_experts, keep = counts
    whole = OutputTensor(ref.name, ref.dtype, ref.shape, ref.nbytes, 0, 0, ref.name)
    if role.expert is not None:
        if role.expert >= keep:
            return None
        origin = origins[role.layer, masked(ref.name, role)]
        return replace(whole, origin=origin, layer=role.layer, slot=role.expert)
    if role.dim is not None:
        row = _row_nbytes(ref, role, num_experts)
        length = (ref.shape[role.dim] - role.extra) // num_experts * keep + role.extra
        shape = (*ref.shape[: role.dim], length, *ref.shape[role.dim + 1 :])
        nbytes = math.prod(shape[: role.dim + 1]) * row
        return replace(
            whole, shape=shape, nbytes=nbytes, layer=role.layer, dim=role.dim, extra=role.extra
        )
    return whole


def _computed(ref: TensorRef, role: Role, recipe: Recipe, keep: int) -> Iterator[OutputTensor]:
    """What a recipe puts in the place of a source tensor: nothing, if its place is another's."""
    if ref.name != recipe.place:
        return
    for name, dtype, shape in recipe.results(keep):
        nbytes = tensor_nbytes(dtype, shape)
        yield OutputTensor(
            name, dtype, shape, nbytes, 0, 0, ref.name, layer=role.layer, recipe=recipe
        )


def _row_nbytes(ref: TensorRef, role: Role, num_experts: int) -> int:
    """Bytes of one entry along the experts' dimension, at one position of those before it."""
    dim = -1 if role.dim is None else role.dim
    length = ref.shape[dim] - role.extra if 0 <= dim < len(ref.shape) else 0
    if length < num_experts or length % num_experts:
        behind = f" and {role.extra} entries behind them" if role.extra else ""
        raise UnsupportedError(
            f"{ref.file}: tensor {ref.name!r} has shape {list(ref.shape)}, "
            f"but {num_experts} experts{behind} were expected along dimension {dim}"
        )
    rows = math.prod(ref.shape[: dim + 1])
    if rows and ref.nbytes % rows:
        raise UnsupportedError(
            f"{ref.file}: tensor {ref.name!r} ({ref.dtype}) packs {ref.nbytes} bytes in {rows} "
            "rows: an expert does not begin at a whole byte"
        )
    return ref.nbytes // rows if rows else 0


def _place(
    unplaced: Sequence[OutputTensor], num_experts: int, keep: int, max_shard_nbytes: int
) -> OutputPlan:
    """Fill the shards one after the other, without holes: the format forbids them."""
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for out in unplaced:
        if groups[-1] and filled + out.nbytes > max_shard_nbytes:
            groups.append([])
            filled = 0
        groups[-1].append(out)
        filled += out.nbytes
    shards = []
    tensors: dict[str, OutputTensor] = {}
    for number, group in enumerate(groups):
        ends = list(itertools.accumulate(out.nbytes for out in group))
        header = _header(group, ends)
        filename = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        shards.append(ShardPlan(filename, header, len(header) + ends[-1]))
        for out, end in zip(group, ends, strict=True):
            offset = len(header) + end - out.nbytes
            tensors[out.name] = replace(out, shard=number, offset=offset)
    total = sum(out.nbytes for out in unplaced)
    return OutputPlan(keep, num_experts, tuple(shards), tensors, total)


def _header(group: Sequence[OutputTensor], ends: Sequence[int]) -> bytes:
    return render_header(
        [
            (out.name, out.dtype, out.shape, end - out.nbytes, end)
            for out, end in zip(group, ends, strict=True)
        ],
        _METADATA,
    )
