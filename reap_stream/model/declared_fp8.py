"""Which weights a checkpoint says it stores quantised, told from its config and index alone.

Those of FP8 are described here, packed ones in `reap_stream.model.declared_packed`. The index
settles it: a weight with a scale beside it is FP8. Without an index the quantisation settings do:
every linear layer except those they name. Layouts are those of `reap_stream.formats.fp8`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reap_stream.checkpoint.strict_json import shown
from reap_stream.errors import UnsupportedError
from reap_stream.formats.fp8 import DEFAULT_BLOCK
from reap_stream.formats.settings import quantization_settings, schemes
from reap_stream.model.declared_packed import DeclaredBlocks, DeclaredPacked, declared_packed
from reap_stream.model.described_mtp import Spec

_MATRIX = 2
Layout = Literal["block", "channel", "tensor"]
_LAYOUTS: dict[str, Layout] = {"block": "block", "channel": "channel", "tensor": "tensor"}


@dataclass(frozen=True, slots=True)
class DeclaredFp8:
    """How a checkpoint's FP8 weights are scaled, and which they are.

    Attributes:
        suffix: what a scale's name adds to its weight's.
        layout: what shares a scale.
        block: rows and columns of a block.
        scale_dtype: safetensors dtype tag of scales.
        names: every name of the index; None without an index.
        excluded: whether the settings leave a module of that name as it is.
    """

    suffix: str
    layout: Layout
    block: tuple[int, int]
    scale_dtype: str
    names: Collection[str] | None
    excluded: Callable[[str], bool]

    def covers(self, name: str, *, linear: bool) -> bool:
        """Whether the weight `name` is FP8.

        Args:
            name: its key in the checkpoint.
            linear: it is the weight of a linear layer that quantisers take (no router, no head).
        """
        if self.names is not None:
            return name + self.suffix in self.names
        return linear and not self.excluded(name.rpartition(".")[0])

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether the tensors of a weight of this shape can be told."""
        return len(shape) == _MATRIX

    def tensors(self, name: str, shape: tuple[int, ...]) -> dict[str, Spec]:
        """The tensors that store a weight: codes and scales."""
        return {
            name: ("F8_E4M3", shape),
            name + self.suffix: (self.scale_dtype, self.scale_shape(shape)),
        }

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a weight [rows, columns]."""
        rows, columns = shape
        if self.layout == "block":
            return (-(-rows // self.block[0]), -(-columns // self.block[1]))
        return (rows, 1) if self.layout == "channel" else (1,)


def declared_weights(
    config: Mapping[str, Any], names: Collection[str] | None, stored: str, path: Path
) -> DeclaredFp8 | DeclaredPacked | DeclaredBlocks | None:
    """What config.json and the index say of quantised weights; None where they speak of none.

    Args:
        config: parsed config.json.
        names: names of the index, None without one.
        stored: dtype tag of the weights that are not quantised.
        path: config.json, for messages.

    Raises:
        UnsupportedError: the weights are quantised in a way whose tensors cannot be told without
            the shards.
    """
    settings = quantization_settings(config)
    method = settings.get("quant_method")
    if not settings:
        return _from_names(names)
    if config.get("expert_dtype") not in (None, "fp8"):
        raise _unknown(f"{method} with experts of {config['expert_dtype']}", path)
    if method == "fp8":
        return _block_fp8(settings, names)
    packed = declared_packed(settings, names, stored, _left_out(settings))
    if packed is not None:
        return packed
    if method == "compressed-tensors":
        return _compressed_tensors(settings, names, stored, path)
    raise _unknown(method, path)


def _from_names(names: Collection[str] | None) -> DeclaredFp8 | None:
    choices: tuple[tuple[str, Layout], ...] = (("_scale_inv", "block"), ("_scale", "channel"))
    for suffix, layout in choices:
        if any(name.endswith(".weight" + suffix) for name in names or ()):
            return DeclaredFp8(suffix, layout, DEFAULT_BLOCK, "F32", names, lambda _: False)
    return None


def _block_fp8(settings: Mapping[str, Any], names: Collection[str] | None) -> DeclaredFp8:
    block = settings.get("weight_block_size")
    listed = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or []
    entries = [f".{entry}." for entry in listed]

    def excluded(module: str) -> bool:
        # MiniMax-M2 names parts of a path ("gate"), Qwen3 whole paths: both are runs of parts.
        return any(entry in f".{module}." for entry in entries)

    if block is None:
        return DeclaredFp8("_scale", "tensor", DEFAULT_BLOCK, "F32", names, excluded)
    return DeclaredFp8("_scale_inv", "block", (block[0], block[1]), "F32", names, excluded)


def _compressed_tensors(
    settings: Mapping[str, Any], names: Collection[str] | None, stored: str, path: Path
) -> DeclaredFp8:
    said = schemes(settings)
    kinds = {(scheme.kind, scheme.bits, scheme.strategy) for scheme in said}
    kind, bits, strategy = kinds.pop() if len(kinds) == 1 else ("", 0, "")
    if (kind, bits) != ("float", 8) or strategy not in _LAYOUTS:
        raise _unknown(settings.get("format") or "compressed-tensors", path)
    block = said[0].block or DEFAULT_BLOCK
    return DeclaredFp8("_scale", _LAYOUTS[strategy], block, stored, names, _left_out(settings))


def _left_out(settings: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether compressed-tensors' settings leave a module as it is."""
    groups = settings.get("config_groups") or {}
    owned = [group for group in groups.values() if isinstance(group, Mapping)]
    targets = [str(target) for group in owned for target in group.get("targets") or ()]
    ignored = [str(entry) for entry in settings.get("ignore") or ()]

    def excluded(module: str) -> bool:
        return _named(module, ignored) or not ("Linear" in targets or _named(module, targets))

    return excluded


def _named(module: str, entries: list[str]) -> bool:
    """Whether an entry is the module's name, or a ``re:`` pattern that matches from its start."""
    return any(
        re.match(entry[3:], module) is not None if entry.startswith("re:") else entry == module
        for entry in entries
    )


def _unknown(method: object, path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: the weights are quantised ({shown(method)}), and what tensors that makes cannot "
        "be told from config.json; give a directory that holds the safetensors shards"
    )
