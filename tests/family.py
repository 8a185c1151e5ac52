"""What makes a tiny model of a family: values that all share, and those of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
NUM_EXPERTS = 8


@dataclass(frozen=True)
class Family:
    """A model type and the config values that make a tiny MoE of it."""

    model_type: str
    values: dict[str, Any] = field(default_factory=dict)
    config_type: str | None = None

    @property
    def id(self) -> str:
        return self.config_type or self.model_type

    @property
    def count_key(self) -> str:
        """The config value that holds the number of experts."""
        keys = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
        return next(key for key in keys if key in self.values)
