"""Which source bytes make up an output tensor, once the kept experts of its layer are known.

The layout says where an output tensor lies; here is what goes there, as runs of source bytes.
Experts that stay neighbours stay one run, so a router of 160 rows is a few dozen copies and a
tensor copied whole is one. Nothing here touches a file.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from reap_stream.checkpoint.layout import OutputPlan, OutputTensor
    from reap_stream.checkpoint.refs import Role, TensorRef


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of source bytes and its place in an output tensor.

    Attributes:
        ref: the source tensor.
        src_offset: first byte, counted from the start of the source tensor.
        dst_offset: first byte, counted from the start of the output tensor.
        nbytes: length in bytes.
    """

    ref: TensorRef
    src_offset: int
    dst_offset: int
    nbytes: int


def pieces(
    out: OutputTensor,
    source: Mapping[str, TensorRef],
    roles: Mapping[str, Role],
    kept: Mapping[int, Sequence[int]],
) -> list[Piece]:
    """The source bytes of an output tensor, as the longest runs there are.

    Args:
        out: the output tensor.
        source: the source's tensors by name.
        roles: as given to `plan_layout`.
        kept: for each layer the source numbers of the kept experts; new number = position. Only
            the tensor's own layer is looked up.

    Returns:
        Runs in the order of the output tensor's bytes; none where it is empty.
    """
    ref = source[out.origin]
    if out.layer is None:
        runs: Iterable[Piece] = [Piece(ref, 0, 0, ref.nbytes)]
    elif out.slot is not None:
        expert = kept[out.layer][out.slot]
        runs = [Piece(source[_renamed(ref.name, roles, expert)], 0, 0, out.nbytes)]
    else:
        runs = _strided(ref, out, kept[out.layer])
    return _merged(runs)


def kept_faults(
    kept: Mapping[int, Sequence[int]], layers: Iterable[int], plan: OutputPlan
) -> list[str]:
    """What is wrong with a choice of experts for the given layers of a plan; empty if nothing is.

    A sound choice has, for each layer, `plan.keep` different source numbers in rising order.
    """
    faults = []
    for layer in layers:
        numbers = kept.get(layer)
        if numbers is None:
            faults.append(f"layer {layer}: no kept experts are given")
        elif len(numbers) != plan.keep:
            faults.append(f"layer {layer}: {len(numbers)} kept experts, {plan.keep} expected")
        elif any(low >= high for low, high in itertools.pairwise(numbers)):
            faults.append(f"layer {layer}: kept experts are not in rising order: {list(numbers)}")
        elif numbers[0] < 0 or numbers[-1] >= plan.num_experts:
            faults.append(
                f"layer {layer}: kept experts {numbers[0]}..{numbers[-1]} are not all in "
                f"0..{plan.num_experts - 1}"
            )
    return faults


def _strided(ref: TensorRef, out: OutputTensor, experts: Sequence[int]) -> Iterator[Piece]:
    """Runs of a tensor that holds every expert of a layer along one dimension."""
    assert out.dim is not None
    outer, length = math.prod(ref.shape[: out.dim]), out.shape[out.dim]
    row = out.nbytes // (outer * length) if outer else 0
    own = (length - out.extra) // len(experts) * row
    behind = out.extra * row
    runs = _runs(experts)
    for position in range(outer):
        src = position * ref.shape[out.dim] * row
        dst = position * length * row
        for slot, expert, count in runs:
            yield Piece(ref, src + expert * own, dst + slot * own, count * own)
        yield Piece(
            ref, src + ref.shape[out.dim] * row - behind, dst + length * row - behind, behind
        )


def _merged(runs: Iterable[Piece]) -> list[Piece]:
    """Join runs that go on where the one before ends; drop empty ones."""
    joined: list[Piece] = []
    for piece in runs:
        last = joined[-1] if joined else None
        if last and last.src_offset + last.nbytes == piece.src_offset:
            joined[-1] = replace(last, nbytes=last.nbytes + piece.nbytes)
        elif piece.nbytes:
            joined.append(piece)
    return joined


def _runs(experts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighbours that stay neighbours: (first slot, first expert, count)."""
    runs: list[tuple[int, int, int]] = []
    for slot, expert in enumerate(experts):
        if runs and expert == runs[-1][1] + runs[-1][2]:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((slot, expert, 1))
    return runs


def _renamed(origin: str, roles: Mapping[str, Role], expert: int) -> str:
    component = roles[origin].component
    assert component is not None
    parts = origin.split(".")
    parts[component] = str(expert)
    return ".".join(parts)
