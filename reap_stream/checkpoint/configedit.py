"""What changes in config.json: the expert count, module names that hold an expert's number, MTP keys.

The JSON is edited, never rebuilt through a model library: libraries rename keys (``num_experts``
becomes ``num_local_experts``, ``rope_theta`` moves into ``rope_parameters``) and several engines
then refuse the file. Key order and everything not named here stay.
"""

from __future__ import annotations

import copy
import json
import re
from typing import TYPE_CHECKING, Any, Final

from reap_stream.checkpoint.expert_names import Renumbering
from reap_stream.checkpoint.quantconfig import renumber_settings
from reap_stream.checkpoint.strict_json import parse_object, shown
from reap_stream.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

SIDE_FILES_NAMING_MODULES: Final = frozenset(
    {
        "hf_quant_config.json",
        "quantize_config.json",
        "quant_config.json",
        "quantization_config.json",
    }
)
"""Files beside config.json in which ModelOpt, GPTQ, AWQ and AutoRound keep quantisation settings."""

# MLX writes its settings twice, under `quantization` too.
_QUANTISATION_KEYS: Final = ("quantization_config", "compression_config", "quantization")
_PART_KEYS: Final = ("text_config", "thinker_config", "llm_config", "language_config")
_MTP_KEY: Final = re.compile(r"(?=.*(?:nextn|mtp))(?=.*(?:layers|modules|predict))", re.IGNORECASE)
_MAX_DEPTH: Final = 64


def edit_config(
    config: Mapping[str, Any],
    count_paths: Sequence[tuple[str, ...]],
    counts: tuple[int, int],
    kept: Mapping[int, Sequence[int]],
    *,
    names: Iterable[str] = (),
    mtp_dropped: bool = False,
) -> dict[str, Any]:
    """The pruned checkpoint's config.

    Args:
        config: the source's parsed config.json; not changed.
        count_paths: the keys that hold the expert count, e.g. ``("text_config", "num_experts")``.
        counts: experts in every layer of the source, and of the pruned checkpoint.
        kept: source numbers of the kept experts by layer; new number = position.
        names: the source's tensors, from which it follows what a pattern selects.
        mtp_dropped: next-token-prediction layers are left out, so their count becomes 0.

    Raises:
        CheckpointError: the config is nested too deeply.
        UnsupportedError: a count is not there or not that of the source, or a quantisation entry
            names experts in a way that cannot be renumbered.
    """
    _check_depth(config, "config.json")
    edited = copy.deepcopy(dict(config))
    for path in count_paths:
        _set_count(edited, path, *counts)
    renumbering = _renumbering(config, kept, names, mtp_dropped=mtp_dropped)
    for part in _parts(edited):
        for key in _QUANTISATION_KEYS:
            if key in part:
                part[key] = renumber_settings(part[key], f"config.json: {key}", key, renumbering)
        if mtp_dropped:
            part.update(dict.fromkeys(_mtp_keys(part), 0))
    return edited


def edit_side_file(
    raw: bytes,
    path: Path,
    config: Mapping[str, Any],
    kept: Mapping[int, Sequence[int]],
    names: Iterable[str] = (),
) -> bytes:
    """A quantisation file beside config.json, its experts renumbered; unchanged where it names none.

    Args:
        raw: the source's file.
        path: where it lies, for messages.
        config: the source's parsed config.json.
        kept: source numbers of the kept experts by layer.
        names: the source's tensors, from which it follows what a pattern selects.

    Raises:
        CheckpointError: it is not a JSON object, or nested too deeply.
        UnsupportedError: it names experts in a way that cannot be renumbered.
    """
    document = parse_object(raw, path)
    _check_depth(document, str(path))
    renumbering = _renumbering(config, kept, names)
    edited = renumber_settings(document, str(path), path.name, renumbering)
    return raw if edited == document else render_config(edited).encode("utf-8")


def _renumbering(
    config: Mapping[str, Any],
    kept: Mapping[int, Sequence[int]],
    names: Iterable[str],
    *,
    mtp_dropped: bool = False,
) -> Renumbering:
    counts = (part.get("num_hidden_layers") for part in _parts(config))
    num_layers = next((count for count in counts if type(count) is int), 0)
    return Renumbering(kept, num_layers, names, mtp_dropped=mtp_dropped)


def mtp_layer_count(config: Mapping[str, Any]) -> int:
    """Next-token-prediction layers the config speaks of; 0 where it speaks of none."""
    return max((part[key] for part in _parts(config) for key in _mtp_keys(part)), default=0)


def render_config(config: Mapping[str, Any]) -> str:
    """The text of config.json, laid out as the Hub's files are."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _parts(config: Mapping[str, Any]) -> Iterator[Any]:
    """The config, and within it those of the language model of a multimodal one."""
    yield config
    for key in _PART_KEYS:
        if isinstance(config.get(key), dict):
            yield from _parts(config[key])


def _check_depth(document: Mapping[str, Any], where: str) -> None:
    """Python's own limit depends on who calls; a fixed one refuses the same files everywhere."""
    level: list[Any] = [document]
    for _ in range(_MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    if level:
        raise CheckpointError(f"{where}: nested more than {_MAX_DEPTH} levels deep")


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
