"""Checkpoints of GLM-4-MoE's layout and chosen widths, written with little memory.

FP8 by output channel, as GLM-4.6-FP8 is: attention, dense MLP, shared and routed experts in E4M3
with float32 scales; router, norms, embeddings and head in bfloat16; one next-token-prediction
layer. Values are random codes from a pool, so routing is spread and nothing is learnt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHARD_NBYTES = 4 * 10**9
POOL_NBYTES = 1 << 28
NBYTES = {"F8_E4M3": 1, "F32": 4, "BF16": 2}

Entry = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Widths:
    """Sizes of a checkpoint; the defaults are GLM-4.6's layer widths."""

    layers: int = 3
    vocabulary: int = 32768
    hidden: int = 5120
    experts: int = 160
    expert_width: int = 1536
    dense_width: int = 12288
    heads: int = 96
    kv_heads: int = 8
    head_dim: int = 128
    top_k: int = 8

    def config(self) -> dict[str, Any]:
        """config.json."""
        weights = {"num_bits": 8, "type": "float", "symmetric": True}
        return {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "attention_bias": True,
            "first_k_dense_replace": 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_width,
            "max_position_embeddings": 202752,
            "moe_intermediate_size": self.expert_width,
            "n_group": 1,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "num_nextn_predict_layers": 1,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000,
            "routed_scaling_factor": 2.5,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "torch_dtype": "bfloat16",
            "use_qk_norm": True,
            "vocab_size": self.vocabulary,
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {**weights, "strategy": "channel", "dynamic": False},
                        "input_activations": {**weights, "strategy": "token", "dynamic": True},
                    }
                },
                "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*eh_proj$"],
            },
        }

    def tensors(self) -> Iterator[Entry]:
        """Every tensor: name, dtype tag, shape."""
        yield "model.embed_tokens.weight", "BF16", (self.vocabulary, self.hidden)
        for layer in range(self.layers + 1):
            yield from self.layer(layer)
        yield "model.norm.weight", "BF16", (self.hidden,)
        yield "lm_head.weight", "BF16", (self.vocabulary, self.hidden)

    def layer(self, layer: int) -> Iterator[Entry]:
        """The tensors of one layer; the one past the last is the next-token-prediction layer."""
        prefix = f"model.layers.{layer}."
        yield from self._attention(prefix)
        if layer == 0:
            yield from self._mlp(prefix + "mlp.", self.dense_width)
        else:
            yield prefix + "mlp.gate.weight", "BF16", (self.experts, self.hidden)
            yield prefix + "mlp.gate.e_score_correction_bias", "F32", (self.experts,)
            yield from self._mlp(prefix + "mlp.shared_experts.", self.expert_width)
            for expert in range(self.experts):
                yield from self._mlp(f"{prefix}mlp.experts.{expert}.", self.expert_width)
        if layer == self.layers:
            yield prefix + "eh_proj.weight", "BF16", (self.hidden, 2 * self.hidden)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{prefix}{norm}.weight", "BF16", (self.hidden,)

    def layer_nbytes(self, layer: int) -> int:
        """Bytes of one layer."""
        return sum(int(np.prod(shape)) * NBYTES[dtype] for _, dtype, shape in self.layer(layer))

    def _attention(self, prefix: str) -> Iterator[Entry]:
        yield prefix + "input_layernorm.weight", "BF16", (self.hidden,)
        yield prefix + "post_attention_layernorm.weight", "BF16", (self.hidden,)
        for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            rows = heads * self.head_dim
            yield from _linear(f"{prefix}self_attn.{name}_proj", rows, self.hidden)
            yield f"{prefix}self_attn.{name}_proj.bias", "BF16", (rows,)
        yield from _linear(f"{prefix}self_attn.o_proj", self.hidden, self.heads * self.head_dim)
        for name in ("q_norm", "k_norm"):
            yield f"{prefix}self_attn.{name}.weight", "BF16", (self.head_dim,)

    def _mlp(self, prefix: str, width: int) -> Iterator[Entry]:
        yield from _linear(prefix + "gate_proj", width, self.hidden)
        yield from _linear(prefix + "up_proj", width, self.hidden)
        yield from _linear(prefix + "down_proj", self.hidden, width)


def _linear(name: str, rows: int, columns: int) -> Iterator[Entry]:
    yield name + ".weight", "F8_E4M3", (rows, columns)
    yield name + ".weight_scale", "F32", (rows, 1)


def make_checkpoint(directory: Path, widths: Widths) -> None:
    """Writes a checkpoint tensor by tensor from a pool of random codes."""
    import torch

    from reap_stream.checkpoint.header import render_header

    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(POOL_NBYTES // 8, generator=generator) * 64
    codes = values.to(torch.float8_e4m3fn).view(torch.uint8).repeat(8).numpy()
    rng = np.random.default_rng(0)
    shards: list[list[tuple[Entry, int]]] = [[]]
    filled = 0
    for entry in widths.tensors():
        nbytes = int(np.prod(entry[2])) * NBYTES[entry[1]]
        if filled + nbytes > SHARD_NBYTES:
            shards.append([])
            filled = 0
        shards[-1].append((entry, nbytes))
        filled += nbytes
    weight_map = {}
    for number, entries in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys((name for (name, _, _), _ in entries), file))
        rows, end = [], 0
        for (name, dtype, shape), nbytes in entries:
            rows.append((name, dtype, shape, end, end + nbytes))
            end += nbytes
        with (directory / file).open("wb") as out:
            out.write(render_header(rows, {"format": "pt"}))
            for entry, nbytes in entries:
                out.write(_values(entry, nbytes, codes, rng))
    total = sum(nbytes for entries in shards for _, nbytes in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(widths.config(), indent=2))


def _values(
    entry: Entry, nbytes: int, codes: np.ndarray[Any, Any], rng: np.random.Generator
) -> bytes | memoryview:
    name, dtype, shape = entry
    if dtype == "F8_E4M3":
        start = int(rng.integers(0, len(codes) - nbytes))
        return memoryview(codes[start : start + nbytes])
    if dtype == "F32":
        scale = 0.02 if "correction_bias" in name else 0.02 / 64
        return (rng.random(shape, dtype=np.float32) * scale + scale / 2).tobytes()
    if "norm" in name:
        values = np.ones(shape, dtype=np.float32)
    else:
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
