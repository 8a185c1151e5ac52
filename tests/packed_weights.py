"""Packed weights of one matrix, and how a test has them decoded."""

from __future__ import annotations

from pathlib import Path

import torch

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats import TORCH_DTYPES, group_weights, known_formats

TAGS = {dtype: tag for tag, dtype in TORCH_DTYPES.items()}
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def refs_of(tensors):
    return {
        name: TensorRef(
            name,
            Path("model.safetensors"),
            TAGS[t.dtype],
            tuple(t.shape),
            0,
            t.numel() * t.itemsize,
        )
        for name, t in tensors.items()
    }


def weight_of(tensors, quantization=None):
    """The one weight `m.weight` that the tensors make, by their names behind `m.`."""
    config = {} if quantization is None else {"quantization_config": quantization}
    named = {f"m.{suffix}": tensor for suffix, tensor in tensors.items()}
    return group_weights(refs_of(named), known_formats(config))["m.weight"]


def decoded(weight, tensors, dtype):
    parts = {role: tensors[ref.name.removeprefix("m.")] for role, ref in weight.parts.items()}
    assert weight.format.refusal(weight) is None
    out = weight.empty(dtype, torch.device("cpu"))
    weight.format.decode(weight, parts, out)
    return out


def matrix(rows=48, columns=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.1


def fused_mxfp4(experts=3, channels=20, columns=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (experts, channels, columns // 32)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8)
    return {"gate_up_proj_blocks": blocks, "gate_up_proj_scales": scales}
