"""``--weights fp8-channel``: E4M3 with a scale for each output channel, as GLM-4.6-FP8 is published.

``X.weight`` F8_E4M3 [N, K], ``X.weight_scale`` F32 [N, 1]; activations are quantised by token when
an engine runs it. compressed-tensors calls this ``float-quantized``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from reap_stream.checkpoint.recipes import Bytes
from reap_stream.formats import Weight
from reap_stream.recoding.base import Part
from reap_stream.recoding.e4m3 import encode_e4m3

_SUFFIX: Final = "_scale"
_SCALE_DTYPES: Final = ("F32", "BF16", "F16")
# What compressed-tensors takes where a channel is all zeros: float32's distance from 1 to the next.
_OF_ZEROS: Final = 2.0**-23


class Fp8Channel:
    """Channel-scaled E4M3, quant_method ``compressed-tensors``."""

    name = "fp8-channel"
    rows = 1
    exact = torch.float32

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """Codes and a scale a row."""
        rows, columns = shape
        return Part("", "F8_E4M3", (rows, columns)), Part(_SUFFIX, "F32", (rows, 1))

    def holds(self, weight: Weight) -> bool:
        """E4M3 with scales of that name and shape."""
        scale = weight.parts.get("scale")
        if scale is None or len(weight.shape) != 2 or weight.format.name != "fp8":
            return False
        named = scale.name == weight.name + _SUFFIX
        return named and scale.shape == (weight.shape[0], 1) and scale.dtype in _SCALE_DTYPES

    def encode(self, values: torch.Tensor, where: str) -> tuple[Bytes, ...]:
        """See `reap_stream.recoding.e4m3`."""
        return encode_e4m3(values, (1, values.shape[1]), _OF_ZEROS, where)

    def quantization_config(self, ignored: Sequence[str]) -> dict[str, Any] | None:
        """As compressed-tensors writes it."""
        weights = _arguments(strategy="channel", dynamic=False, observer="minmax")
        inputs = _arguments(strategy="token", dynamic=True, observer=None)
        group = {
            "input_activations": inputs,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": weights,
        }
        return {
            "config_groups": {"group_0": group},
            "format": "float-quantized",
            "global_compression_ratio": None,
            "ignore": list(ignored),
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }


def _arguments(*, strategy: str, dynamic: bool, observer: str | None) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": None,
        "num_bits": 8,
        "observer": observer,
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": True,
        "type": "float",
    }
