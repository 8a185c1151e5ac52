"""Source checkpoints for the clients: tiny, random, in names, config and formats as published.

transformers' ``save_pretrained`` is not used: it respells config.json in a way that some clients do
not read. Widths are multiples of 128, as FP8 in blocks needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.builders import write_checkpoint
from tests.families import NUM_EXPERTS

VOCABULARY = 256
HIDDEN = 256
WIDTH = 128
LAYERS = 3
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
TOP_K = 2
BLOCK = 128
E4M3_MAX = 448.0

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Source:
    """One source checkpoint.

    Attributes:
        family: ``qwen3_moe`` or ``glm4_moe``.
        weights: ``bf16``, ``fp8-block`` or ``fp8-channel``.
        mtp: whether a next-token-prediction layer follows the decoder's.
    """

    family: str
    weights: str = "bf16"
    mtp: bool = False

    @property
    def dense_layers(self) -> int:
        """Leading layers without experts."""
        return 1 if self.family == "glm4_moe" else 0


def write_source(directory: Path, source: Source) -> Path:
    """Writes config, one shard and a tokenizer."""
    tensors = store(_Weights(source).tensors(), source.weights)
    write_checkpoint(directory, tensors, _config(source))
    # Words t0, t1, ...: for a client that takes its prompts as text alone.
    words = {f"t{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def store(tensors: Tensors, weights: str) -> Tensors:
    """The tensors as a checkpoint in `weights` holds them: `Source.weights`."""
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if "correction_bias" in name:
            stored[name] = tensor
        elif weights == "bf16" or not _is_quantised(name):
            stored[name] = tensor.to(torch.bfloat16)
        elif weights == "fp8-channel":
            scale = tensor.abs().amax(dim=1, keepdim=True) / E4M3_MAX
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale"] = scale
        else:
            rows, columns = tensor.shape
            parts = tensor.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = parts.abs().amax(dim=(1, 3)) / E4M3_MAX
            codes = tensor / _spread(scale, tensor.shape)
            stored[name] = codes.to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
    return stored


def decode(tensors: Tensors) -> Tensors:
    """The float32 values that a checkpoint's tensors stand for, by the formats' own formulas."""
    meant: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith((".weight_scale", ".weight_scale_inv")):
            continue
        value = tensor.float()
        if f"{name}_scale" in tensors:
            value = value * tensors[f"{name}_scale"].float()
        elif f"{name}_scale_inv" in tensors:
            value = value * _spread(tensors[f"{name}_scale_inv"].float(), value.shape)
        meant[name] = value
    return meant


class _Weights:
    """Random float32 weights by their published names."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._generator = torch.Generator().manual_seed(7)

    def tensors(self) -> Tensors:
        tensors = {
            "model.embed_tokens.weight": self._noise(VOCABULARY, HIDDEN),
            "model.norm.weight": self._norm(),
            "lm_head.weight": self._linear(VOCABULARY, HIDDEN),
        }
        for index in range(LAYERS + self._source.mtp):
            own = self._layer(index) | (self._prediction(tensors) if index == LAYERS else {})
            tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in own.items()}
        return tensors

    def _layer(self, index: int) -> Tensors:
        tensors = {f"self_attn.{name}_norm.weight": self._norm(HEAD_DIM) for name in "qk"}
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"self_attn.{name}_proj.weight"] = self._linear(heads * HEAD_DIM, HIDDEN)
        tensors["self_attn.o_proj.weight"] = self._linear(HIDDEN, HEADS * HEAD_DIM)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.weight"] = self._norm()
        dense = index < self._source.dense_layers
        return tensors | (self._mlp("mlp", 4 * WIDTH) if dense else self._experts())

    def _experts(self) -> Tensors:
        tensors = {"mlp.gate.weight": 2 * self._linear(NUM_EXPERTS, HIDDEN)}
        if self._source.family == "glm4_moe":
            tensors["mlp.gate.e_score_correction_bias"] = 0.1 * self._noise(NUM_EXPERTS)
            tensors |= self._mlp("mlp.shared_experts", WIDTH)
        for expert in range(NUM_EXPERTS):
            tensors |= self._mlp(f"mlp.experts.{expert}", WIDTH)
        return tensors

    def _prediction(self, own: Tensors) -> Tensors:
        tensors = {
            f"{name}.weight": self._norm() for name in ("enorm", "hnorm", "shared_head.norm")
        }
        tensors["eh_proj.weight"] = self._linear(HIDDEN, 2 * HIDDEN)
        # As published: copies of the model's.
        tensors["embed_tokens.weight"] = own["model.embed_tokens.weight"].clone()
        tensors["shared_head.head.weight"] = own["lm_head.weight"].clone()
        return tensors

    def _mlp(self, name: str, width: int) -> Tensors:
        return {
            f"{name}.gate_proj.weight": self._linear(width, HIDDEN),
            f"{name}.up_proj.weight": self._linear(width, HIDDEN),
            f"{name}.down_proj.weight": self._linear(HIDDEN, width),
        }

    def _linear(self, rows: int, columns: int) -> torch.Tensor:
        return 1.5 * self._noise(rows, columns) / math.sqrt(columns)

    def _norm(self, width: int = HIDDEN) -> torch.Tensor:
        return 1 + 0.1 * self._noise(width)

    def _noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)


def _is_quantised(name: str) -> bool:
    """All linears but router, head and the MTP layer's ``eh_proj``, as publishers choose."""
    return name.endswith("_proj.weight") and "eh_proj" not in name


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return wide[: shape[0], : shape[1]]


def _config(source: Source) -> dict[str, Any]:
    config = {
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * WIDTH,
        "max_position_embeddings": 1024,
        "model_type": source.family,
        "moe_intermediate_size": WIDTH,
        "norm_topk_prob": True,
        "num_attention_heads": HEADS,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }
    config |= _GLM if source.family == "glm4_moe" else _QWEN
    if source.family == "glm4_moe":
        config["num_nextn_predict_layers"] = int(source.mtp)
    if source.weights != "bf16":
        config["quantization_config"] = _quantization(source)
    return config


_QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "max_window_layers": LAYERS,
    "mlp_only_layers": [],
    "num_experts": NUM_EXPERTS,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "use_sliding_window": False,
}
_GLM = {
    "architectures": ["Glm4MoeForCausalLM"],
    "first_k_dense_replace": 1,
    "n_group": 1,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "routed_scaling_factor": 2.5,
    "topk_group": 1,
    "use_qk_norm": True,
}


def _quantization(source: Source) -> dict[str, Any]:
    routers = range(source.dense_layers, LAYERS + source.mtp)
    whole = ["lm_head", *(f"model.layers.{index}.mlp.gate" for index in routers)]
    if source.mtp:
        whole += [f"model.layers.{LAYERS}.{name}" for name in ("eh_proj", "shared_head.head")]
    if source.weights == "fp8-block":
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": whole,
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "input_activations": {**common, "dynamic": True, "strategy": "token"},
        "targets": ["Linear"],
        "weights": {**common, "dynamic": False, "strategy": "channel"},
    }
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "ignore": whole,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
