"""What config.json says of quantisation: where it says it, and the schemes of compressed-tensors.

Names and shapes of tensors tell most; settings tell what they leave open: how many bits a code in
a 32-bit word has, and how many columns a block or a group of a channel-wise weight spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from reap_stream.errors import CheckpointError

_KEYS: Final = ("quantization_config", "compression_config")
# Where models of several parts keep the settings of their language part.
_PARTS: Final = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one group of compressed-tensors' settings stores weights.

    Attributes:
        bits: bits of a code.
        kind: ``int`` or ``float``.
        strategy: what shares a scale: ``tensor``, ``channel``, ``group``, ``tensor_group``, ``block``.
        group_size: columns of a group; None where the strategy has none.
        symmetric: there are no zero points.
        block: rows and columns of a block; None where the strategy has none.
        format: name of the packing, where the group has one of its own.
    """

    bits: int
    kind: str
    strategy: str
    group_size: int | None
    symmetric: bool
    block: tuple[int, int] | None
    format: str | None


def quantization_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantisation settings of config.json; empty where it has none.

    Raises:
        CheckpointError: they are no object.
    """
    owners = (config, *(config.get(part) for part in _PARTS))
    for owner in owners:
        for key in _KEYS:
            found = owner.get(key) if isinstance(owner, Mapping) else None
            if found is not None and not isinstance(found, Mapping):
                message = f"config.json: {key} is {found!r}, expected an object"
                raise CheckpointError(message)
            if found:
                return found
    return {}


def weight_block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """`weight_block_size` of quant_method ``fp8``, or None.

    Raises:
        CheckpointError: it is not a pair of positive integers.
    """
    return _pair(settings.get("weight_block_size"), "weight_block_size")


def schemes(settings: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The schemes of weights that the settings list, each once, in their order.

    Raises:
        CheckpointError: a group's values are not what they must be.
    """
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        message = f"config.json: config_groups is {groups!r}, expected an object"
        raise CheckpointError(message)
    return tuple(dict.fromkeys(_schemes(groups)))


def _schemes(groups: Mapping[str, Any]) -> Iterator[Scheme]:
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        bits, size = weights.get("num_bits"), weights.get("group_size")
        if type(bits) is not int or not 1 <= bits <= 16 or not (size is None or type(size) is int):
            message = (
                f"config.json: config_groups.{name}.weights has num_bits {bits!r} and group_size "
                f"{size!r}, expected integers"
            )
            raise CheckpointError(message)
        has_group = size is not None and size > 0
        yield Scheme(
            bits=bits,
            kind=str(weights.get("type") or "int"),
            strategy=str(weights.get("strategy") or ("group" if has_group else "channel")),
            group_size=size if has_group else None,
            symmetric=bool(weights.get("symmetric", True)),
            block=_pair(_unfolded(weights.get("block_structure")), "block_structure"),
            format=group.get("format"),
        )


def _unfolded(block: Any) -> Any:
    """Older settings write a block as text: ``128x128``."""
    parts = block.split("x") if isinstance(block, str) else []
    return [int(part) for part in parts] if parts and all(p.isdigit() for p in parts) else block


def _pair(block: Any, key: str) -> tuple[int, int] | None:
    if block is None or block == []:
        return None
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    if not is_pair or not all(type(n) is int and n > 0 for n in block):
        message = f"config.json: {key} is {block!r}, expected two positive integers"
        raise CheckpointError(message)
    return (block[0], block[1])
