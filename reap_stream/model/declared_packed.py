"""Which weights a checkpoint says it stores packed, told from its config and index alone.

The index settles it: a weight whose codes it lists is packed. Without an index the quantisation
settings do: every linear layer except those they name. Layouts are those of
`reap_stream.formats.packed_int`, `nvfp4`, `mxfp4` and `mxfp4_experts`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from reap_stream.formats.mxfp4 import GROUP as MXFP4_GROUP
from reap_stream.formats.nvfp4 import GROUP as NVFP4_GROUP
from reap_stream.formats.settings import Scheme, schemes
from reap_stream.model.described_mtp import Spec

Specs = dict[str, Spec]
Layout = Callable[[int, int], Specs]
"""Rows and columns of a weight → its tensors by what their names add to the module's."""

_WORD_BITS: Final = 32
_FUSED_DIMENSIONS: Final = 3


@dataclass(frozen=True, slots=True)
class DeclaredPacked:
    """How a checkpoint's packed weights are stored, and which they are.

    Attributes:
        layout: the tensors of a weight.
        names: every name of the index; None without an index.
        excluded: whether the settings leave a module of that name as it is.
    """

    layout: Layout
    names: Collection[str] | None
    excluded: Callable[[str], bool]
    suffix: None = None

    def covers(self, name: str, *, linear: bool) -> bool:
        """Whether the weight `name` is packed; see `DeclaredFp8.covers`."""
        module, _, leaf = name.rpartition(".")
        if leaf != "weight":
            return False
        if self.names is not None:
            return all(f"{module}.{part}" in self.names for part in list(self.layout(1, 1))[:2])
        return linear and not self.excluded(module)

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether the tensors of a weight of this shape can be told."""
        return len(shape) == 2

    def tensors(self, name: str, shape: tuple[int, ...]) -> Specs:
        """The tensors that store a weight: codes, scales and what lies beside them."""
        module = name.rpartition(".")[0]
        return {f"{module}.{part}": spec for part, spec in self.layout(*shape).items()}


@dataclass(frozen=True, slots=True)
class DeclaredBlocks:
    """gpt-oss: the experts of a layer in two tensors of MXFP4 blocks and scales.

    Attributes:
        names: every name of the index; None without an index.
    """

    names: Collection[str] | None
    suffix: None = None

    def covers(self, name: str, *, linear: bool) -> bool:
        """Whether the weight `name` is packed; see `DeclaredFp8.covers`."""
        del linear
        fused = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
        return f"{name}_blocks" in self.names if self.names is not None else fused

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether the tensors of a weight of this shape can be told."""
        return len(shape) == _FUSED_DIMENSIONS

    def tensors(self, name: str, shape: tuple[int, ...]) -> Specs:
        """Blocks and scales, rows and columns changing places."""
        experts, columns, rows = shape
        groups = columns // MXFP4_GROUP
        return {
            f"{name}_blocks": ("U8", (experts, rows, groups, MXFP4_GROUP // 2)),
            f"{name}_scales": ("U8", (experts, rows, groups)),
        }


def declared_packed(
    settings: Mapping[str, Any],
    names: Collection[str] | None,
    stored: str,
    excluded: Callable[[str], bool],
) -> DeclaredPacked | DeclaredBlocks | None:
    """What the quantisation settings say of packed weights; None where they speak of none.

    Args:
        settings: those of config.json.
        names: names of the index, None without one.
        stored: dtype tag of the weights that are not quantised, and of integer scales.
        excluded: whether compressed-tensors leaves a module of that name as it is.
    """
    method = settings.get("quant_method")
    if method == "mxfp4":
        return DeclaredBlocks(names)
    if method == "modelopt" and "NVFP4" in str(settings.get("quant_algo")):
        patterns = settings.get("ignore") or settings.get("exclude_modules") or []

        def ignored(module: str) -> bool:
            return any(fnmatch.fnmatchcase(module, str(pattern)) for pattern in patterns)

        return DeclaredPacked(_nvfp4_modelopt, names, ignored)
    layout = _compressed(schemes(settings), stored) if method == "compressed-tensors" else None
    return None if layout is None else DeclaredPacked(layout, names, excluded)


def _compressed(said: tuple[Scheme, ...], stored: str) -> Layout | None:
    if len(said) != 1:
        return None
    (scheme,) = said
    has_group = scheme.group_size is not None
    known = (scheme.strategy, has_group) in (("group", True), ("channel", False))
    if scheme.kind == "int" and scheme.bits in (4, 8) and known:
        return lambda rows, columns: _packed_int(scheme, stored, (rows, columns))
    if (scheme.kind, scheme.bits) != ("float", 4):
        return None
    return {NVFP4_GROUP: _nvfp4, MXFP4_GROUP: _mxfp4}.get(scheme.group_size or 0)


def _packed_int(scheme: Scheme, stored: str, shape: tuple[int, int]) -> Specs:
    rows, columns = shape
    groups = 1 if scheme.group_size is None else -(-columns // scheme.group_size)
    found: Specs = {
        "weight_packed": ("I32", (rows, -(-columns * scheme.bits // _WORD_BITS))),
        "weight_scale": (stored, (rows, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if not scheme.symmetric:
        found["weight_zero_point"] = ("I32", (-(-rows * scheme.bits // _WORD_BITS), groups))
    return found


def _nvfp4(rows: int, columns: int) -> Specs:
    return {
        "weight_packed": ("U8", (rows, columns // 2)),
        "weight_scale": ("F8_E4M3", (rows, columns // NVFP4_GROUP)),
        "weight_global_scale": ("F32", (1,)),
        "input_global_scale": ("F32", (1,)),
    }


def _nvfp4_modelopt(rows: int, columns: int) -> Specs:
    return {
        "weight": ("U8", (rows, columns // 2)),
        "weight_scale": ("F8_E4M3", (rows, columns // NVFP4_GROUP)),
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    }


def _mxfp4(rows: int, columns: int) -> Specs:
    return {
        "weight_packed": ("U8", (rows, columns // 2)),
        "weight_scale": ("U8", (rows, columns // MXFP4_GROUP)),
    }
