"""Names and matrices of single experts, where a checkpoint holds all experts of a layer in one tensor.

Engines read FP8 experts one tensor each, as they are published. How a fused tensor comes apart is
transformers' own conversion turned round: it names the family's tensors and cuts their rows. Families
whose checkpoints are fused in every release have no such conversion, and no published names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import torch

from reap_stream.errors import UnsupportedError
from reap_stream.model.opened import OpenedModel
from reap_stream.model.transformers_api import checkpoint_tensors, get_tensor

_EXPERT: Final = re.compile(r"^(?P<head>.*)\.experts\.0\.(?P<rest>.+)$")
_FUSED: Final = re.compile(r"^(?P<head>.*)\.experts\.")
_LAYER: Final = re.compile(r"^(?:.*?\.)?layers\.\d+\.")
_MATRIX_DIMS: Final = 2


class Splitter:
    """Takes single experts out of the fused tensors that feed one parameter.

    Args:
        model: the model.
        target: the parameter, the same in every layer but for the layer's number.

    Raises:
        UnsupportedError: the family's checkpoints do not name single experts.
    """

    def __init__(self, model: OpenedModel, target: str) -> None:
        self._network = model.architecture.model
        self._target = target
        parameter = get_tensor(self._network, target)
        made = checkpoint_tensors(self._network, {target: parameter[:1]})
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in made.items():
            match = _EXPERT.match(name)
            if match is None or tensor.dim() != _MATRIX_DIMS:
                message = (
                    f"{model.architecture.name} is published with all experts of a layer in one "
                    f"tensor ({name!r}), and engines know no FP8 experts under other names; "
                    "--weights keep and --weights bf16 can be written"
                )
                raise UnsupportedError(message)
            self._shapes[match["rest"]] = tuple(tensor.shape)
            self._head = _without_layer(match["head"])

    def shapes(self, place: str, slot: int) -> Mapping[str, tuple[int, ...]]:
        """The matrices of the expert in a place: name in the output → shape.

        Args:
            place: name of the fused tensor, which says the layer.
            slot: number of the expert.

        Raises:
            UnsupportedError: the checkpoint names its modules otherwise than the published ones.
        """
        match = _FUSED.match(place)
        if match is None or _without_layer(match["head"]) != self._head:
            message = (
                f"{place!r} lies elsewhere than {self._head!r}, where this family's published "
                "checkpoints hold experts; save it with transformers' save_pretrained first"
            )
            raise UnsupportedError(message)
        prefix = f"{match['head']}.experts.{slot}."
        return {prefix + rest: shape for rest, shape in self._shapes.items()}

    def cut(self, values: torch.Tensor) -> Sequence[torch.Tensor]:
        """These matrices, in that order, of an expert's slice [1, ...] of the parameter."""
        return list(checkpoint_tensors(self._network, {self._target: values}).values())


def _without_layer(head: str) -> str:
    return _LAYER.sub("", head)
