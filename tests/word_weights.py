"""Weights in the layouts of GPTQ and AWQ with random codes, and how a test has them decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.formats import group_weights, known_formats

TAGS = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int8: "I8",
}


def refs_of(parts):
    return {
        name: TensorRef(name, Path("model.safetensors"), TAGS[t.dtype], tuple(t.shape), 0, t.nbytes)
        for name, t in parts.items()
    }


def claimed(tensors, config):
    """The one weight of some tensors, and its parts by role."""
    refs = refs_of(tensors)
    weights = group_weights(refs, known_formats({"quantization_config": config}))
    weight = weights["m.weight"]
    return weight, {role: tensors[ref.name] for role, ref in weight.parts.items()}


def decoded(tensors, config, dtype=torch.float32):
    weight, parts = claimed(tensors, config)
    assert weight.format.refusal(weight) is None
    out = torch.full(weight.shape, 7.0, dtype=dtype)
    weight.format.decode(weight, parts, out)
    return out


def random_words(rng, shape):
    return torch.from_numpy(rng.integers(-(2**31), 2**31, shape, dtype=np.int32))


def random_gptq(rows, columns, group, bits, scattered=False, seed=0, scale_dtype=torch.float16):
    rng = np.random.default_rng(seed)
    groups, per_word = -(-columns // group), 32 // bits
    order = np.arange(columns, dtype=np.int32) // group
    if scattered:
        rng.shuffle(order)
    return {
        "m.qweight": random_words(rng, (columns // per_word, rows)),
        "m.qzeros": random_words(rng, (groups, rows // per_word)),
        "m.scales": torch.from_numpy(rng.random((groups, rows)) - 0.5).to(scale_dtype),
        "m.g_idx": torch.from_numpy(order),
    }


def random_awq(rows, columns, group, seed=0, scale_dtype=torch.float16):
    rng = np.random.default_rng(seed)
    groups = columns // group
    return {
        "m.qweight": random_words(rng, (columns, rows // 8)),
        "m.qzeros": random_words(rng, (groups, rows // 8)),
        "m.scales": torch.from_numpy(rng.random((groups, rows)) - 0.5).to(scale_dtype),
    }


def rounded(values, dtype):
    """One product in float32 is exact in float64, so this is one rounding and then another."""
    return torch.from_numpy(values.astype(np.float32)).to(dtype)
