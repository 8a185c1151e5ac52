"""What changes in the files beside the shards when weights are written in another format."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from reap_stream.checkpoint.configedit import SIDE_FILES_NAMING_MODULES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from reap_stream.checkpoint.source import Checkpoint

_SETTINGS: Final = "quantization_config"
_SETTINGS_KEYS: Final = (_SETTINGS, "compression_config", "quantization")
_DTYPE_KEYS: Final = ("dtype", "torch_dtype")
_WIDER: Final = frozenset({"float64", "float32", "float16"})


@dataclass(frozen=True, slots=True)
class FormatChange:
    """How weights are written where that is not as the source has them.

    Attributes:
        replaced: whether the source's settings no longer hold; all else is unused if they do.
        quantization: the new ``quantization_config``; None: the weights are not quantised.
        dtype: name of the dtype in which plain weights are now; None: as they were.
        working_nbytes: memory that the writing of one weight takes at the most.
        counts: for the records: how many weights are written in which format.
    """

    replaced: bool = False
    quantization: dict[str, Any] | None = None
    dtype: str | None = None
    working_nbytes: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)

    def seen_on(self, source: Checkpoint) -> Checkpoint:
        """The source as the output's config.json and side files are to follow from it.

        Its settings are replaced before experts are renumbered in them, so settings that could
        not be renumbered do no harm. Files with such settings stay behind.
        """
        if not self.replaced:
            return source
        side_files = tuple(n for n in source.side_files if n not in SIDE_FILES_NAMING_MODULES)
        return replace(source, config=self._config(source.config), side_files=side_files)

    def _config(self, config: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(config)
        for part in _parts(changed):
            for key in _SETTINGS_KEYS:
                if part is not changed or key != _SETTINGS or self.quantization is None:
                    part.pop(key, None)
            for key in _DTYPE_KEYS:
                if self.dtype is not None and part.get(key) in _WIDER:
                    part[key] = self.dtype
        if self.quantization is not None:
            changed[_SETTINGS] = copy.deepcopy(self.quantization)
        return changed


KEPT: Final = FormatChange()
"""Every weight keeps its format."""


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and the configs within it, of the parts of a multimodal model."""
    yield config
    for value in config.values():
        if isinstance(value, dict) and value is not config.get(_SETTINGS):
            yield from _parts(value)
