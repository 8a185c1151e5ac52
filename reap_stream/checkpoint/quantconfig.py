"""Quantisation settings after pruning: every module they name follows its expert.

Settings name modules to leave out or to treat otherwise, in lists (``ignore``,
``modules_to_not_convert``, ``exclude_modules``, ``targets``, ...) and in keys (``dynamic``,
``quantized_layers``, ``extra_config``, ...). Fields are not listed here: whatever stands for an
expert's module is taken for one, wherever it lies, so that a field nobody has heard of follows too.

After pruning an entry must select the new names of exactly those kept modules it selected before:

* a name is renumbered, or goes with its expert;
* a pattern that selects as before stays as it is: ``re:.*experts.*``, ``*mlp.experts.*``;
* one that writes a layer's and an expert's number out is renumbered;
* any other is replaced by the names it stands for, or refused.

Entries keep their order, and what several become stands in their place, so where the first match
wins it still does.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from reap_stream.checkpoint.module_patterns import read_pattern
from reap_stream.checkpoint.module_selection import PatternEditor
from reap_stream.checkpoint.strict_json import shown
from reap_stream.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from reap_stream.checkpoint.expert_names import ExpertName, Renumbering

_COMMA_FIELDS: Final = frozenset({"block_name_to_quantize", "to_quant_block_names"})
_GROUPS: Final = "config_groups"

_Family = tuple[tuple[str, ...], tuple[str, ...]]


def renumber_settings(settings: Any, where: str, field: str, renumbering: Renumbering) -> Any:
    """A copy of quantisation settings in which every module's name follows its expert.

    Args:
        settings: any JSON value; what is no setting stays as it is.
        where: file and key, for messages.
        field: the key the settings stand under.
        renumbering: which experts stay, and the modules of the source.

    Raises:
        UnsupportedError: an entry selects experts in a way that no entries after pruning can.
    """
    return _Editor(renumbering).edited(settings, where, field)


class _Editor:
    """One walk over settings."""

    def __init__(self, renumbering: Renumbering) -> None:
        self._renumbering = renumbering
        self._patterns = PatternEditor(renumbering)

    def edited(self, value: Any, where: str, field: str) -> Any:
        if isinstance(value, dict):
            return self._edited_dict(value, where, field)
        if isinstance(value, list):
            return self._edited_list(value, where, field, self._layerless(value))
        if isinstance(value, str) and "experts" in value:
            return self._edited_text(value, where, field)
        return copy.deepcopy(value)

    def _edited_dict(self, value: dict[str, Any], where: str, field: str) -> dict[str, Any]:
        edited: dict[str, Any] = {}
        layerless = self._layerless(list(value))
        for key, item in value.items():
            for name in self._entries(key, where, field, layerless):
                # Of two equal keys the first wins, as it does where patterns are tried in turn.
                edited.setdefault(name, self.edited(item, f"{where}.{key}", key))
        return self._checked_groups(value, edited, where) if field == _GROUPS else edited

    def _edited_list(
        self, items: list[Any], where: str, field: str, layerless: Mapping[_Family, frozenset[int]]
    ) -> list[Any]:
        edited: list[Any] = []
        seen: set[str] = set()
        for item in items:
            if isinstance(item, list):
                inner = self._edited_list(item, where, field, layerless)
                edited += [inner] if inner or not item else []
            elif not isinstance(item, str):
                edited.append(self.edited(item, where, field))
            else:
                names = self._entries(item, where, field, layerless)
                edited += [name for name in dict.fromkeys(names) if name not in seen]
                seen.update(names)
        return edited

    def _edited_text(self, value: str, where: str, field: str) -> str:
        if field in _COMMA_FIELDS:
            names = value.split(",")
            return ",".join(self._edited_list(names, where, field, self._layerless(names)))
        pattern = read_pattern(value, field)
        name = self._renumbering.parse(value)
        is_pruned = name is not None and name.layer in (None, *self._renumbering.kept)
        if is_pruned if pattern is None else self._patterns.names_experts(pattern, where):
            raise UnsupportedError(
                f"{where}: {shown(value)} names one expert outside a list; renumber it by hand"
            )
        return value

    def _entries(
        self, entry: str, where: str, field: str, layerless: Mapping[_Family, frozenset[int]]
    ) -> list[str]:
        """What becomes of an entry: nothing, one entry, or several."""
        pattern = read_pattern(entry, field)
        if pattern is not None:
            return self._patterns.edited(pattern, where)
        name = self._renumbering.parse(entry)
        if name is None:
            return [entry]
        if name.layer is None:
            return self._of_every_layer(name, where, layerless[name.family])
        new = self._renumbering.renamed(name)
        return [] if new is None else [new]

    def _of_every_layer(self, name: ExpertName, where: str, together: frozenset[int]) -> list[str]:
        """An entry such as ``mlp.experts.5.up_proj``, which speaks of every layer.

        `together`: the experts that this entry and those like it name.
        """
        image = self._renumbering.everywhere(together)
        if image is not None and image <= together:
            return [name.full] if name.expert in image else []
        alone = self._renumbering.everywhere([name.expert])
        if alone is not None:
            return [name.of(slot) for slot in alone]
        names = [
            new
            for source, new in self._renumbering.experts
            if f".{name.full}." in f".{source.full}."
        ]
        if not names:
            raise UnsupportedError(
                f"{where}: {shown(name.full)} names an expert of no certain layer, and its number "
                "differs by layer after pruning; write it out for every layer"
            )
        return names

    def _layerless(self, entries: list[Any]) -> dict[_Family, frozenset[int]]:
        """Experts that entries without a layer name together, by what stands around the number."""
        found: dict[_Family, frozenset[int]] = {}
        for entry in _texts(entries):
            name = self._renumbering.parse(entry)
            if name is not None and name.layer is None:
                found[name.family] = found.get(name.family, frozenset()) | {name.expert}
        return found

    def _checked_groups(
        self, before: dict[str, Any], edited: dict[str, Any], where: str
    ) -> dict[str, Any]:
        """Groups of compressed-tensors: those emptied go, and no module is put into two.

        A name counts for more than a pattern to some readers, so a pattern that becomes names must
        not share one with another group.
        """
        for key, group in before.items():
            for name in _targets(group):
                entry, place = self._patterns.replaced.get(name, ("", f"{where}.{key}."))
                if not place.startswith(f"{where}.{key}."):
                    raise UnsupportedError(
                        f"{where}: {shown(entry)} selects {shown(name)}, which {shown(key)} names "
                        "too; write the modules out by name"
                    )
        left = {
            key: group for key, group in edited.items()
            if _targets(group) or not _targets(before.get(key))
        }  # fmt: skip
        return left or edited


def _texts(items: list[Any]) -> Iterator[str]:
    for item in items:
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            yield from _texts(item)


def _targets(group: Any) -> list[str]:
    targets = group.get("targets") if isinstance(group, dict) else None
    return [name for name in targets if isinstance(name, str)] if isinstance(targets, list) else []
