"""A small GLM-4-MoE checkpoint with random weights, laid out as GLM-4.6-FP8 is on the Hub.

FP8 (E4M3) with one scale an output channel, compressed-tensors' ``float-quantized``: attention,
dense and shared MLPs, experts. In bfloat16: embeddings, head, norms, routers. One
next-token-prediction (MTP) layer behind the decoder's, shards with an index, a byte-level BPE
tokenizer with a chat template. Some experts of each layer are made quiet, so that there is
something to find.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from reap_stream.calibration.builtin import DEFAULT_BUILTIN, builtin_parts

_E4M3_MAX: Final = 448.0
_QUIET: Final = 0.1
_SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# A small vocabulary is learnt from the first few hundred kilobytes; more text changes little.
_TRAINING_DOCUMENTS: Final = 60

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class DemoModel:
    """Sizes of the checkpoint, and the seed of its weights.

    Attributes:
        hidden: width of the hidden states.
        layers: decoder layers; the first is dense, the others have experts.
        experts: routed experts a layer.
        quiet: how many of them have outputs a tenth as long as the others'.
        width: inner width of an expert; a dense MLP's is four times that.
        top_k: experts a token.
        heads: attention heads; a quarter as many for keys and values.
        vocabulary: tokens of the tokenizer.
        shards: files that hold the weights.
        seed: of weights and of the choice of quiet experts.
    """

    hidden: int = 256
    layers: int = 6
    experts: int = 32
    quiet: int = 12
    width: int = 128
    top_k: int = 4
    heads: int = 8
    vocabulary: int = 2048
    shards: int = 4
    seed: int = 0

    @property
    def moe_layers(self) -> range:
        """Decoder layers with experts."""
        return range(1, self.layers)

    def quiet_experts(self, layer: int) -> list[int]:
        """The quiet experts of a layer, in order of their numbers."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + layer)
        order: list[int] = torch.randperm(self.experts, generator=generator).tolist()
        return sorted(order[: self.quiet])


def write_checkpoint(directory: Path, model: DemoModel) -> None:
    """Writes config, shards, index and tokenizer.

    Args:
        directory: is made; must not exist.
        model: sizes and seed. The same ones give the same weights with the same torch.
    """
    directory.mkdir(parents=True)
    _write_json(directory / "config.json", _config(model))
    _write_tokenizer(directory, model.vocabulary)
    _write_shards(directory, model)


def _config(model: DemoModel) -> dict[str, Any]:
    routers = [f"model.layers.{i}.mlp.gate" for i in (*model.moe_layers, model.layers)]
    prediction = f"model.layers.{model.layers}.eh_proj"
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": False,
        "eos_token_id": 0,
        "first_k_dense_replace": 1,
        "head_dim": model.hidden // model.heads,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "intermediate_size": 4 * model.width,
        "max_position_embeddings": 4096,
        "model_type": "glm4_moe",
        "moe_intermediate_size": model.width,
        "n_group": 1,
        "n_routed_experts": model.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": model.heads,
        "num_experts_per_tok": model.top_k,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.heads // 4,
        "num_nextn_predict_layers": 1,
        "pad_token_id": 0,
        "partial_rotary_factor": 0.5,
        "quantization_config": _quantization(["lm_head", *routers, prediction]),
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "use_qk_norm": True,
        "vocab_size": model.vocabulary,
    }


def _quantization(ignore: list[str]) -> dict[str, Any]:
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "config_groups": {
            "group_0": {
                "input_activations": {**common, "dynamic": True, "strategy": "token"},
                "targets": ["Linear"],
                "weights": {**common, "dynamic": False, "strategy": "channel"},
            }
        },
        "format": "float-quantized",
        "ignore": ignore,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _write_tokenizer(directory: Path, vocabulary: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    end = _SPECIAL_TOKENS[0]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    _write_json(directory / "tokenizer_config.json", settings)
    (directory / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")


def _training_text() -> Iterator[str]:
    turns = chain.from_iterable(zip_longest(*builtin_parts(DEFAULT_BUILTIN)))
    return islice((text for text in turns if text is not None), _TRAINING_DOCUMENTS)


def _write_shards(directory: Path, model: DemoModel) -> None:
    """One group of layers a shard, made and written before the next is made."""
    weights = _Weights(model)
    layers = [partial(weights.layer, index) for index in range(model.layers + 1)]
    parts: list[Callable[[], Tensors]] = [weights.outside, *layers]
    per_shard = math.ceil(len(parts) / model.shards)
    groups = [parts[start : start + per_shard] for start in range(0, len(parts), per_shard)]
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {key: tensor for make in group for key, tensor in make().items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / "model.safetensors.index.json", index)


class _Weights:
    """Random tensors under the names the Hub's GLM-4.6 checkpoints have."""

    def __init__(self, model: DemoModel) -> None:
        self._model = model
        self._generator = torch.Generator().manual_seed(model.seed)

    def outside(self) -> Tensors:
        """What lies in no layer."""
        shape = (self._model.vocabulary, self._model.hidden)
        return {
            "model.embed_tokens.weight": self._normal(*shape).to(torch.bfloat16),
            "model.norm.weight": self._norm(),
            "lm_head.weight": self._linear(*shape).to(torch.bfloat16),
        }

    def layer(self, index: int) -> Tensors:
        """One decoder layer; the one behind the last predicts the next token but one (MTP)."""
        hidden = self._model.hidden
        tensors = {"input_layernorm.weight": self._norm()}
        tensors["post_attention_layernorm.weight"] = self._norm()
        tensors |= self._attention()
        tensors |= self._experts(index) if index else self._mlp("mlp", 4 * self._model.width)
        if index == self._model.layers:
            tensors |= {f"{name}.weight": self._norm() for name in ("enorm", "hnorm")}
            tensors["shared_head.norm.weight"] = self._norm()
            # As published: engines give this projection no scales.
            tensors["eh_proj.weight"] = self._linear(hidden, 2 * hidden).to(torch.bfloat16)
        return {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}

    def _attention(self) -> Tensors:
        model, head = self._model, self._model.hidden // self._model.heads
        tensors = {f"self_attn.{name}.weight": self._norm(head) for name in ("q_norm", "k_norm")}
        for name, heads in (("q", model.heads), ("k", model.heads // 4), ("v", model.heads // 4)):
            tensors |= self._fp8(f"self_attn.{name}_proj", heads * head, model.hidden)
        return tensors | self._fp8("self_attn.o_proj", model.hidden, model.hidden)

    def _experts(self, index: int) -> Tensors:
        model = self._model
        quiet = set(model.quiet_experts(index))
        router = self._linear(model.experts, model.hidden)
        tensors = {
            "mlp.gate.weight": router.to(torch.bfloat16),
            "mlp.gate.e_score_correction_bias": 0.05 * self._normal(model.experts),
        }
        for expert in range(model.experts):
            loudness = _QUIET if expert in quiet else 1.0
            tensors |= self._mlp(f"mlp.experts.{expert}", model.width, loudness)
        return tensors | self._mlp("mlp.shared_experts", model.width)

    def _mlp(self, name: str, width: int, loudness: float = 1.0) -> Tensors:
        hidden = self._model.hidden
        up = self._fp8(f"{name}.gate_proj", width, hidden) | self._fp8(
            f"{name}.up_proj", width, hidden
        )
        return up | self._fp8(f"{name}.down_proj", hidden, width, loudness)

    def _fp8(self, name: str, rows: int, columns: int, loudness: float = 1.0) -> Tensors:
        """Codes [rows, columns] in E4M3 and scales [rows, 1] in float32, under which rows are full."""
        weight = self._linear(rows, columns)
        scale = weight.abs().amax(dim=1, keepdim=True) / _E4M3_MAX
        codes = (weight / scale).to(torch.float8_e4m3fn)
        return {f"{name}.weight": codes, f"{name}.weight_scale": scale * loudness}

    def _linear(self, rows: int, columns: int) -> torch.Tensor:
        return self._normal(rows, columns) / math.sqrt(columns)

    def _norm(self, width: int | None = None) -> torch.Tensor:
        return (1 + 0.1 * self._normal(width or self._model.hidden)).to(torch.bfloat16)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
