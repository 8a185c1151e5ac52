"""The number of an expert in a module's name, and what becomes of it when experts go.

    model.layers.3.mlp.experts.17.up_proj     layer 3, expert 17
    mtp.layers.0.mlp.experts.17.up_proj       the first layer behind the decoder's
    mlp.experts.17.up_proj                    expert 17 of every layer

Kept experts differ by layer, so a name that speaks of every layer may stand for another number in
each of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_FOLDER: Final = "experts"
# No leading zeros, which no checkpoint writes, and few enough digits for any Python to convert.
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class ExpertName:
    """A module's name with an expert's number in it.

    Attributes:
        parts: the name, split at its dots.
        component: where among them the expert's number stands.
        layer: the layer, counted as the roles of tensors count it; None where the name says none.
    """

    parts: tuple[str, ...]
    component: int
    layer: int | None

    @property
    def expert(self) -> int:
        """The expert's number in the source."""
        return int(self.parts[self.component])

    @property
    def full(self) -> str:
        """The name as it was written."""
        return ".".join(self.parts)

    @property
    def family(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What stands before and behind the number: equal for counterparts of one layer."""
        return self.parts[: self.component], self.parts[self.component + 1 :]

    def of(self, expert: int) -> str:
        """The name of another expert's counterpart."""
        head, tail = self.family
        return ".".join((*head, str(expert), *tail))


def parse_expert_name(name: str, num_layers: int) -> ExpertName | None:
    """The expert that a module's name speaks of; None where it speaks of none.

    Args:
        name: a module or tensor, its parents' names perhaps left out.
        num_layers: decoder layers, on which the count of layers below ``mtp`` carries on.
    """
    if _FOLDER not in name:
        return None
    parts = tuple(name.split("."))
    places = (i for i in range(1, len(parts)) if parts[i - 1] == _FOLDER and _is_number(parts[i]))
    component = next(places, None)
    if component is None:
        return None
    place = next((i for i in range(component - 2, 0, -1) if parts[i].isdigit()), None)
    if place is None:
        return ExpertName(parts, component, None)
    if not _is_number(parts[place]):
        return None
    first = num_layers if "mtp" in parts[:place] else 0
    return ExpertName(parts, component, int(parts[place]) + first)


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


class Renumbering:
    """Which experts of each layer stay, and the modules of the checkpoint this is about.

    Attributes:
        kept: source numbers of the kept experts by layer; new number = position.
        num_layers: decoder layers.
        mtp_dropped: next-token-prediction layers are left out.
    """

    def __init__(
        self,
        kept: Mapping[int, Sequence[int]],
        num_layers: int,
        names: Iterable[str] = (),
        *,
        mtp_dropped: bool = False,
    ) -> None:
        """`names`: the source's tensors, without which patterns cannot be told what they match."""
        self.kept = kept
        self.num_layers = num_layers
        self.mtp_dropped = mtp_dropped
        self._names = names
        self._slots = {
            layer: {expert: slot for slot, expert in enumerate(experts)}
            for layer, experts in kept.items()
        }

    def parse(self, name: str) -> ExpertName | None:
        """See `parse_expert_name`."""
        return parse_expert_name(name, self.num_layers)

    def renamed(self, name: ExpertName) -> str | None:
        """The name after pruning, of an expert of a certain layer; None where the expert goes."""
        assert name.layer is not None
        slots = self._slots.get(name.layer)
        if slots is None:
            dropped = self.mtp_dropped and name.layer >= self.num_layers
            return None if dropped else name.of(name.expert)
        slot = slots.get(name.expert)
        return None if slot is None else name.of(slot)

    def everywhere(self, experts: Iterable[int]) -> frozenset[int] | None:
        """New numbers of the given experts where all layers agree on them, else None."""
        wanted = frozenset(experts)
        images = {
            frozenset(slot for expert, slot in slots.items() if expert in wanted)
            for slots in self._slots.values()
        }
        return images.pop() if len(images) == 1 else None

    @cached_property
    def members(self) -> tuple[ExpertName, ...]:
        """Modules of the checkpoint inside an expert of a pruned layer."""
        names = (self.parse(module) for module in self._modules)
        return tuple(name for name in names if name is not None and name.layer in self.kept)

    @cached_property
    def experts(self) -> tuple[tuple[ExpertName, str], ...]:
        """Of these, those inside an expert that stays: (source name, new name)."""
        renamed = ((name, self.renamed(name)) for name in self.members)
        return tuple((name, new) for name, new in renamed if new is not None)

    @cached_property
    def others(self) -> tuple[str, ...]:
        """Modules of the checkpoint in no expert."""
        return tuple(module for module in self._modules if self.parse(module) is None)

    @cached_property
    def _modules(self) -> tuple[str, ...]:
        # The last part names a tensor of the module, save where it is the expert's own number.
        return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in self._names))
