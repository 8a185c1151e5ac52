"""What changes in config.json: the expert count, module names that hold an expert's number, MTP keys.

The JSON is edited, never rebuilt through a model library: libraries rename keys (``num_experts``
becomes ``num_local_experts``, ``rope_theta`` moves into ``rope_parameters``) and several engines
then refuse the file. Key order and everything not named here stay.

Quantisation settings name modules to leave out or to treat otherwise. Where such a name holds an
expert's number it must follow the expert; where a pattern does, no renumbering is right.
"""

from __future__ import annotations

import copy
import json
import re
from typing import TYPE_CHECKING, Any, Final

from reap_stream.checkpoint.strict_json import parse_object, shown
from reap_stream.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

SIDE_FILES_NAMING_MODULES: Final = frozenset(
    {"hf_quant_config.json", "quantize_config.json", "quant_config.json"}
)
"""Files beside config.json in which ModelOpt, GPTQ and AWQ keep quantisation settings."""

_QUANTISATION_KEYS: Final = ("quantization_config", "compression_config")
_MTP_KEY: Final = re.compile(r"(?=.*(?:nextn|mtp))(?=.*(?:layers|modules|predict))", re.IGNORECASE)
_EXPERT: Final = re.compile(
    r"(?:^|\.)(?P<mtp>mtp\.)?layers\.(?P<layer>\d+)\.(?:[^.]+\.)*experts\.(?P<expert>\d+)(?=\.|$)"
)
_LAYERLESS_EXPERT: Final = re.compile(r"(?:^|\.)experts\.\d+(?:\.|$)")
_PATTERN_CHARACTER: Final = re.compile(r"[\\^$*+?{}\[\]|()]")
# What stands for "any number" in a pattern; digits left in the component after these are removed
# name certain experts.
_ANY_NUMBER: Final = re.compile(r"(?:\\d|\[0-9\])(?:[+*]|\{\d+,\d*\})[+?]?")
# The digit of `w2` is part of a word.
_CERTAIN_NUMBER: Final = re.compile(r"(?<![A-Za-z_])\d|\\d")
_NUMBER_COMPONENT: Final = re.compile(r"experts(?:\\?\.|\[\.\])(.*?)(?:\\\.|\[\.\]|\.(?![*+?])|$)")


def edit_config(
    config: Mapping[str, Any],
    count_paths: Sequence[tuple[str, ...]],
    old: int,
    keep: int,
    kept: Mapping[int, Sequence[int]],
    mtp_dropped: bool,
) -> dict[str, Any]:
    """The pruned checkpoint's config.

    Args:
        config: the source's parsed config.json; not changed.
        count_paths: the keys that hold the expert count, e.g. ``("text_config", "num_experts")``.
        old: experts in every layer of the source.
        keep: experts in every layer of the pruned checkpoint.
        kept: source numbers of the kept experts by layer; new number = position.
        mtp_dropped: next-token-prediction layers are left out, so their count becomes 0.

    Raises:
        UnsupportedError: a count is not there or not `old`, or a quantisation entry names experts
            in a way that cannot be renumbered.
    """
    edited = copy.deepcopy(dict(config))
    renumbering = _Renumbering(config, kept)
    for path in count_paths:
        _set_count(edited, path, old, keep)
    for part in _parts(edited):
        for key in _QUANTISATION_KEYS:
            if key in part:
                part[key] = renumbering.edited(part[key], f"config.json: {key}")
        if mtp_dropped:
            part.update(dict.fromkeys(_mtp_keys(part), 0))
    return edited


def edit_side_file(
    raw: bytes, path: Path, config: Mapping[str, Any], kept: Mapping[int, Sequence[int]]
) -> bytes:
    """A quantisation file beside config.json, its experts renumbered; unchanged where it names none.

    Args:
        raw: the source's file.
        path: where it lies, for messages.
        config: the source's parsed config.json.
        kept: source numbers of the kept experts by layer.

    Raises:
        CheckpointError: it is not a JSON object.
        UnsupportedError: it names experts in a way that cannot be renumbered.
    """
    document = parse_object(raw, path)
    edited = _Renumbering(config, kept).edited(document, str(path))
    return raw if edited == document else render_config(edited).encode("utf-8")


def mtp_layer_count(config: Mapping[str, Any]) -> int:
    """Next-token-prediction layers the config speaks of; 0 where it speaks of none."""
    return max((part[key] for part in _parts(config) for key in _mtp_keys(part)), default=0)


def render_config(config: Mapping[str, Any]) -> str:
    """The text of config.json, laid out as the Hub's files are."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _parts(config: Mapping[str, Any]) -> Iterator[Any]:
    """The config, and within it that of the language model of a multimodal one."""
    yield config
    if isinstance(config.get("text_config"), dict):
        yield config["text_config"]


def _mtp_keys(part: Mapping[str, Any]) -> list[str]:
    # `type(...) is int`, since True is an int to isinstance and no count.
    return [key for key, value in part.items() if type(value) is int and _MTP_KEY.match(key)]


def _set_count(config: dict[str, Any], path: tuple[str, ...], old: int, keep: int) -> None:
    where = f"config.json: {'.'.join(path)}"
    *folders, key = path
    part: Any = config
    for folder in folders:
        part = part.get(folder) if isinstance(part, dict) else None
    if not isinstance(part, dict) or key not in part:
        raise UnsupportedError(f"{where}: missing; the expert count was expected there")
    value = part[key]
    counts = value if isinstance(value, list) else [value]
    if not counts or any(type(count) is not int or count != old for count in counts):
        raise UnsupportedError(
            f"{where}: is {shown(value)}, but every layer has {old} experts; models whose layers "
            "differ in experts cannot be pruned to one count"
        )
    part[key] = [keep] * len(counts) if isinstance(value, list) else keep


class _Renumbering:
    """Old to new names of modules, for one choice of experts."""

    def __init__(self, config: Mapping[str, Any], kept: Mapping[int, Sequence[int]]) -> None:
        self._slots = {
            layer: {expert: slot for slot, expert in enumerate(experts)}
            for layer, experts in kept.items()
        }
        counts = (part.get("num_hidden_layers") for part in _parts(config))
        self._num_layers = next((count for count in counts if type(count) is int), 0)

    def edited(self, value: Any, where: str) -> Any:
        """A copy of quantisation settings; names in lists and keys follow their experts."""
        if isinstance(value, dict):
            return {
                name: self.edited(item, f"{where}.{key}")
                for key, item in value.items()
                if (name := self._name(key, where)) is not None
            }
        if isinstance(value, list):
            return self._edited_list(value, where)
        if isinstance(value, str) and self._name(value, where) != value:
            raise UnsupportedError(
                f"{where}: {shown(value)} names one expert outside a list; renumber it by hand"
            )
        return value

    def _edited_list(self, items: list[Any], where: str) -> list[Any]:
        edited: list[Any] = []
        seen: set[str] = set()
        for item in items:
            if not isinstance(item, str):
                edited.append(self.edited(item, where))
                continue
            name = self._name(item, where)
            if name is not None and name not in seen:
                seen.add(name)
                edited.append(name)
        return edited

    def _name(self, name: str, where: str) -> str | None:
        """The name of a module after pruning; None where its expert is gone."""
        if name.startswith("re:") or _PATTERN_CHARACTER.search(name):
            _check_pattern(name, where)
            return name
        match = _EXPERT.search(name)
        if match is None:
            if _LAYERLESS_EXPERT.search(name):
                raise UnsupportedError(
                    f"{where}: {shown(name)} names an expert of no certain layer; "
                    "write it out for every layer"
                )
            return name
        # `mtp.layers.0` is the first layer after the decoder's, where roles carry on the count.
        layer = int(match["layer"]) + (self._num_layers if match["mtp"] else 0)
        if layer not in self._slots:
            return name
        slot = self._slots[layer].get(int(match["expert"]))
        if slot is None:
            return None
        return f"{name[: match.start('expert')]}{slot}{name[match.end('expert') :]}"


def _check_pattern(name: str, where: str) -> None:
    for match in _NUMBER_COMPONENT.finditer(_ANY_NUMBER.sub("", name)):
        if _CERTAIN_NUMBER.search(match[1]):
            raise UnsupportedError(
                f"{where}: pattern {shown(name)} names experts by number, and pruning changes the "
                "numbers; write the modules out by name"
            )
