"""A model with a prediction layer, trained for about a minute on text that has something to learn.

The text has topics. Within one a word follows another by the topic's own permutation of all words,
but for a few that are noise; a row's first token names its topic. So what comes next, and what
comes after it, is known to a model that learnt the permutations, and experts have something to
divide among them. Most experts of a layer are never used, as some are not in models that were
published: in each layer others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from tests.builders import load_tensors, read_config, save, write_checkpoint
from tests.mtp_oracle import forward_layer, last_hidden_state

TOPICS = 8
EXPERTS = 16
ALIVE = 4
WORDS = 32
_VOCABULARY = TOPICS + WORDS
_NOISE = 0.05
_WIDTH = 20
_BATCH = 32
_STEPS = 300


class Text:
    """Rows of tokens about some topics.

    Args:
        seed: of the topics' permutations.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._next = np.stack([rng.permutation(WORDS) for _ in range(TOPICS)])

    def rows(
        self, count: int, topics: range, rng: np.random.Generator
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Token ids [count, width] about random ones of the topics, one a row."""
        topic = rng.integers(topics.start, topics.stop, count)
        words = TOPICS + rng.integers(0, WORDS, (count, _WIDTH))
        noisy = rng.random((count, _WIDTH)) < _NOISE
        for position in range(2, _WIDTH):
            told = TOPICS + self._next[topic, words[:, position - 1] - TOPICS]
            words[:, position] = np.where(noisy[:, position], words[:, position], told)
        words[:, 0] = topic
        return words


def train(directory: Path, text: Text, seed: int) -> Path:
    """Trains a GLM-4-MoE with one prediction layer and writes it as its publishers would."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    main, head = _models()
    parameters = {id(p): p for p in (*main.parameters(), *head.parameters())}
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=_STEPS)
    for _ in range(_STEPS):
        ids = torch.from_numpy(text.rows(_BATCH, range(TOPICS), rng))
        hidden = last_hidden_state(main, ids)
        ahead = forward_layer(head, 0, hidden[:, :-1], ids)
        loss = _loss(main.lm_head(hidden[:, :-1]), ids[:, 1:])
        loss = loss + _loss(main.lm_head(ahead[:, :-1]), ids[:, 2:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return _write(directory, main, head)


def acceptance(main: Any, head: Any, ids: torch.Tensor) -> float:
    """The share of the head's greedy drafts that the model itself would have said.

    A draft at position i is for token i + 2: the model must say the same after token i + 1.
    """
    with torch.no_grad():
        hidden = last_hidden_state(main, ids)
        ahead = forward_layer(head, 0, hidden[:, :-1], ids)
        drafts = main.lm_head(ahead[:, :-1]).argmax(-1)
        said = main.lm_head(hidden[:, 1:-1]).argmax(-1)
    return float((drafts == said).float().mean())


def _models() -> tuple[Any, Any]:
    config = AutoConfig.for_model(
        "glm4_moe",
        vocab_size=_VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=12,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        max_position_embeddings=64,
        pad_token_id=0,
        num_nextn_predict_layers=1,
    )
    main = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation="grouped_mm"
    )
    head = MtpModel(main, 1)
    # transformers' prediction layers are made to be loaded: their experts begin as anything.
    for parameter in head.layers.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=config.initializer_range)
    for module in (*main.modules(), *head.modules()):
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.copy_(_biases())
            # With smaller weights a router learns for long to prefer any expert.
            torch.nn.init.normal_(module.weight, std=0.5)
    return main.train(), head.train()


def _biases() -> torch.Tensor:
    """Most experts of a layer are never chosen, as scores lie between 0 and 1."""
    dead = torch.randperm(EXPERTS)[: EXPERTS - ALIVE]
    return torch.zeros(EXPERTS).index_fill(0, dead, -1.0)


def _loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def _write(directory: Path, main: Any, head: Any) -> Path:
    """Joins both, the prediction layer under the names of GLM's publishers."""
    alone = save(main.eval(), directory / "alone")
    number = main.config.num_hidden_layers
    tensors = load_tensors(alone)
    for name, tensor in head.layers[0].state_dict().items():
        for stored, value in _published(name, tensor.detach()):
            tensors[f"model.layers.{number}.{stored}"] = value
    config = {**read_config(alone), "num_nextn_predict_layers": 1}
    return write_checkpoint(directory / "whole", tensors, config)


def _published(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    rest = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
    if not rest.startswith("mlp.experts."):
        return [(rest, tensor)]
    leaves = ["gate_proj", "up_proj"] if rest.endswith("gate_up_proj") else ["down_proj"]
    return [
        (f"mlp.experts.{expert}.{leaf}.weight", part.clone())
        for expert, whole in enumerate(tensor)
        for leaf, part in zip(leaves, whole.chunk(len(leaves)), strict=True)
    ]
