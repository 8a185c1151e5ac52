"""Which checkpoint key feeds which parameter, as transformers' own loading maps them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from reap_stream.errors import UnsupportedError


def checkpoint_tensors(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in which a checkpoint holds a model's `state`, under the checkpoint's names.

    Args:
        model: the model.
        state: its parameters and buffers by name; meta tensors do.

    Raises:
        UnsupportedError: transformers cannot turn its conversion for this model round.
    """
    try:
        tensors: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    except (RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        message = (
            f"transformers cannot say how a checkpoint of {type(model).__name__} names its "
            f"tensors: {error}"
        )
        raise UnsupportedError(message) from error
    return tensors


class KeyMap:
    """Checkpoint key → parameter of the model, as transformers' own loading maps them.

    Args:
        model: the model.
        mapping: its conversions, where they are not those that transformers registers for it.
    """

    def __init__(self, model: Any, mapping: Sequence[Any] | None = None) -> None:
        if mapping is None:
            mapping = get_model_conversion_mapping(model, add_legacy=True)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {
            pattern: entry for entry in self._converters for pattern in entry.source_patterns
        }
        self._model = model
        self._state = model.state_dict()

    def target(self, name: str) -> tuple[str, str | None] | None:
        """The parameter a key feeds and the converter pattern it matched; None if it feeds none."""
        prefix = self._model.base_model_prefix
        renamed, pattern = rename_source_key(
            name, self._renamings, self._converters, prefix, self._state
        )
        if renamed not in self._state and name in self._state:
            renamed, pattern = rename_source_key(name, [], [], prefix, self._state)
        return (renamed, pattern) if renamed in self._state else None

    def source_patterns(self, pattern: str) -> list[str]:
        """All source patterns of the converter that owns `pattern`, in the converter's order."""
        return list(self._by_pattern[pattern].source_patterns)

    def made_beside(self, target: str, pattern: str) -> tuple[str, ...]:
        """Further parameters that the converter of `pattern` makes where it makes `target`."""
        first, *others = self._by_pattern[pattern].target_patterns
        return tuple(target.replace(first, other, 1) for other in others if first in target)

    def stacks_rows(self, pattern: str) -> bool:
        """Whether the converter only stacks experts and joins their rows: no value moves."""
        operations = self._by_pattern[pattern].operations
        stacked = isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
        joined = all(isinstance(op, Concatenate) and op.dim == 1 for op in operations[1:])
        return stacked and joined and len(operations) <= 2

    def convert(
        self,
        target: str,
        tensors: Iterable[tuple[str | None, list[torch.Tensor]]],
        *,
        one_along: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Runs the converter of `target` on tensors grouped by source pattern.

        Args:
            target: full name of the (first) parameter the tensors feed.
            tensors: (source pattern, its tensors in checkpoint order).
            one_along: dimension of the parameter along which they hold one expert; None: all.

        Returns:
            Full parameter name → converted tensor.
        """
        groups = dict(tensors)
        pattern = next(iter(groups))
        if pattern is None:
            return {target: groups[None][0]}
        converter = copy.deepcopy(self._by_pattern[pattern])
        for source, values in groups.items():
            converter.collected_tensors[source] = [_deferred(value) for value in values]
        model = self._model if one_along is None else _OneExpert(self._model, one_along)
        converted = converter.convert(target, model=model, config=self._model.config)
        return {
            name: value[0] if isinstance(value, list) else value
            for name, value in converted.items()
        }


class _OneExpert:
    """A model to converters that look at the shape of the parameter they make."""

    def __init__(self, model: Any, dim: int) -> None:
        self._model = model
        self._dim = dim

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        whole: torch.Tensor = self._model.get_parameter(name)
        return torch.empty_like(whole, device="meta").narrow(self._dim, 0, 1)


def _deferred(value: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: value
