"""What a pattern of quantisation settings becomes when experts go, by what it selects.

A pattern that selects all experts of a layer or none says nothing of numbers and stays. One that
writes a layer's and an expert's number out is renumbered as a name is. Any other is replaced by the
names it stands for. Whether that can be done depends on the checkpoint alone, not on which experts
stay, so a job that will be refused is refused before it begins.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Final

from reap_stream.checkpoint.strict_json import shown
from reap_stream.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from reap_stream.checkpoint.expert_names import ExpertName, Renumbering
    from reap_stream.checkpoint.module_patterns import Pattern

_MAX_NAMES: Final = 1_000_000
_MAX_SECONDS: Final = 60.0


class PatternEditor:
    """Patterns of one file's settings.

    Attributes:
        replaced: source name of every module that a replaced pattern stood for → (the pattern,
            where it stood).
    """

    def __init__(self, renumbering: Renumbering) -> None:
        self.replaced: dict[str, tuple[str, str]] = {}
        self._renumbering = renumbering
        self._deadline = time.monotonic() + _MAX_SECONDS
        self._written = 0

    def names_experts(self, pattern: Pattern, where: str) -> bool:
        """Whether a pattern must change with the experts' numbers."""
        if self._written_out(pattern) is not None:
            return True
        readings = pattern.readings()
        if not readings or not self._renumbering.members:
            return pattern.names_a_number()
        return not all(self._is_blind(pattern, selects, where) for selects in readings)

    def edited(self, pattern: Pattern, where: str) -> list[str]:
        """The entries that stand for a pattern after pruning.

        Raises:
            UnsupportedError: there are none that can.
        """
        if not self.names_experts(pattern, where):
            return [pattern.entry]
        written = self._written_out(pattern)
        if written is not None:
            return self._renumbered(pattern, written)
        return self._written_by_name(pattern, where)

    def _written_out(self, pattern: Pattern) -> re.Match[str] | None:
        """Layer and expert of a pattern, unless `layers.0` may be the first below ``mtp`` too."""
        written = pattern.written_out()
        head = pattern.text[: written.start()] if written is not None else ""
        is_open = re.search(r"[*+?\[]", head) is not None
        members = self._renumbering.members
        if "mtp" in head or (is_open and any("mtp" in name.parts for name in members)):
            return None
        return written

    def _renumbered(self, pattern: Pattern, written: re.Match[str]) -> list[str]:
        name = self._renumbering.parse(f"layers.{written['layer']}.experts.{written['expert']}")
        new = self._renumbering.renamed(name) if name is not None else None
        if new is None:
            return []
        head, tail = pattern.text[: written.start("expert")], pattern.text[written.end("expert") :]
        return [f"{pattern.sign}{head}{new.rpartition('.')[2]}{tail}"]

    def _is_blind(self, pattern: Pattern, selects: Callable[[str], bool], where: str) -> bool:
        """Whether it selects all experts of a layer or none, of each projection."""
        names: Iterable[ExpertName] = self._renumbering.members
        if not pattern.has_digit:
            # Then a number's digits are all alike to it, and one name of each shape will do.
            names = {_shape(name.full): name for name in names}.values()
        found: dict[tuple[str, str], bool] = {}
        for name in names:
            head, tail = (".".join(parts) for parts in name.family)
            key = (head if pattern.has_digit else _shape(head), tail)
            selected = self._timed(selects, name.full, where)
            if found.setdefault(key, selected) != selected:
                return False
        return True

    def _written_by_name(self, pattern: Pattern, where: str) -> list[str]:
        readings = pattern.readings()
        if not readings or not self._renumbering.members:
            raise UnsupportedError(
                f"{where}: pattern {shown(pattern.entry)} names experts by number, and pruning "
                "changes the numbers; write the modules out by name"
            )
        chosen = [self._chosen(pattern, selects, where) for selects in readings]
        if chosen[0] != chosen[-1]:
            raise UnsupportedError(
                f"{where}: pattern {shown(pattern.entry)} selects other experts where it must end "
                "with a part of the name than where it need not; write the modules out by name"
            )
        self.replaced.update(dict.fromkeys(chosen[0], (pattern.entry, where)))
        experts = self._renumbering.experts
        if all((name.full in chosen[0]) == readings[0](new) for name, new in experts):
            return [pattern.entry]
        names = [pattern.exact(new) for name, new in experts if name.full in chosen[0]]
        self._written += len(names)
        if self._written > _MAX_NAMES:
            raise UnsupportedError(
                f"{where}: its patterns stand for more than {_MAX_NAMES} experts' modules"
            )
        return names

    def _chosen(self, pattern: Pattern, selects: Callable[[str], bool], where: str) -> set[str]:
        """Source names of the experts' modules that a pattern selects, which are all it may."""
        other = next((n for n in self._renumbering.others if self._timed(selects, n, where)), None)
        if other is not None:
            raise UnsupportedError(
                f"{where}: pattern {shown(pattern.entry)} names experts by number and "
                f"{shown(other)} too; write the modules out by name"
            )
        names = (name.full for name in self._renumbering.members)
        return {name for name in names if self._timed(selects, name, where)}

    def _timed(self, selects: Callable[[str], bool], name: str, where: str) -> bool:
        if time.monotonic() > self._deadline:
            raise UnsupportedError(
                f"{where}: to match its patterns takes more than {_MAX_SECONDS:g} seconds; "
                "write the modules out by name"
            )
        return selects(name)


def _shape(name: str) -> str:
    return re.sub(r"[0-9]", "0", name)
