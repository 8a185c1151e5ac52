"""What must hold of a source's tensors, and of the output's names, before they are laid out."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from reap_stream.checkpoint.refs import WHOLE
from reap_stream.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from reap_stream.checkpoint.layout import OutputTensor
    from reap_stream.checkpoint.refs import Role, TensorRef


def check_experts(
    refs: Iterable[TensorRef], roles: Mapping[str, Role], num_experts: int
) -> dict[tuple[int | None, str], str]:
    """Check that the experts of every layer are complete and alike; give expert 0's name of each.

    The key is the layer and the name with its expert's number masked.

    Raises:
        UnsupportedError: they are not.
    """
    groups: dict[tuple[int | None, str], dict[int, TensorRef]] = defaultdict(dict)
    for ref in refs:
        role = roles.get(ref.name, WHOLE)
        if role.expert is not None:
            groups[role.layer, masked(ref.name, role)][role.expert] = ref
    for (layer, pattern), experts in groups.items():
        _check_complete(layer, pattern, experts, num_experts)
        _check_alike(layer, pattern, experts)
    return {key: experts[0].name for key, experts in groups.items()}


def _check_complete(
    layer: int | None, pattern: str, experts: Mapping[int, TensorRef], num_experts: int
) -> None:
    surplus = sorted(expert for expert in experts if not 0 <= expert < num_experts)
    if surplus:
        raise UnsupportedError(
            f"layer {layer}: {pattern} exists for expert {surplus[0]}, "
            f"but the model has {num_experts} experts (0..{num_experts - 1})"
        )
    missing = [expert for expert in range(num_experts) if expert not in experts]
    if missing:
        raise UnsupportedError(
            f"layer {layer}: {pattern} exists for {len(experts)} of {num_experts} experts; "
            f"the first without it is expert {missing[0]}: pruned, its place could not be filled"
        )


def _check_alike(layer: int | None, pattern: str, experts: Mapping[int, TensorRef]) -> None:
    """An expert moves into another's place, so counterparts must agree in dtype and shape."""
    first = experts[0]
    for expert, ref in experts.items():
        if (ref.dtype, ref.shape) != (first.dtype, first.shape):
            raise UnsupportedError(
                f"layer {layer}: {pattern} is {first.dtype} {list(first.shape)} for expert 0, "
                f"but {ref.dtype} {list(ref.shape)} for expert {expert}: layers whose experts "
                "differ in precision or shape cannot be renumbered"
            )


def check_names(outs: Iterable[OutputTensor]) -> None:
    """Check that no two tensors have one name: computed ones bring names of their own.

    Raises:
        UnsupportedError: the source has given such a name to another.
    """
    seen: dict[str, OutputTensor] = {}
    for out in outs:
        other = seen.setdefault(out.name, out)
        if other is not out:
            raise UnsupportedError(
                f"{out.name!r} would be made of both {other.origin!r} and {out.origin!r}: the "
                "source has a tensor of a name that the output needs for another"
            )


def masked(name: str, role: Role) -> str:
    """A tensor's name with its expert's number masked: what counterparts have in common."""
    assert role.component is not None
    parts = name.split(".")
    parts[role.component] = "*"
    return ".".join(parts)
