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
# Many heads, as few of them make equal scores, whose order depends on the tokens beside them.
INDEXER: dict[str, Any] = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16}
NUM_EXPERTS = 8


@dataclass(frozen=True)
class Family:
    """A model type and the config values that make a tiny MoE of it.

    Attributes:
        model_type: as config.json has it.
        values: of the part of the config that describes the text decoder.
        config_type: the config's type where it is not the model's.
        text: keys that lead to that part in a vision-language or omni config; empty: all of it.
        around: values of the whole config beside that part.
        auto: the class of transformers by which such a model is loaded.
        since: first release of transformers known to run it right, its experts so that they can be
            scored; empty: any that is supported and has the family.
        count: dotted key of the number of experts in `values` where it is none of the usual ones.
    """

    model_type: str
    values: dict[str, Any] = field(default_factory=dict)
    config_type: str | None = None
    text: tuple[str, ...] = ()
    around: dict[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    count: str = ""
    since: str = ""

    @property
    def id(self) -> str:
        return self.config_type or self.model_type

    @property
    def count_key(self) -> str:
        """The config value that holds the number of experts."""
        if self.count:
            return self.count
        keys = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
        return next(key for key in keys if key in self.values)

    @property
    def experts_per_token(self) -> int:
        """Experts that a token is sent to: two in nearly all."""
        keys = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
        return next((int(self.values[key]) for key in keys if key in self.values), 2)

    @property
    def groups(self) -> int:
        """Groups that the router divides the experts into."""
        return int(self.values.get("n_group") or self.values.get("num_expert_group") or 1)

    @property
    def topk_groups(self) -> int:
        """Groups that a token may choose from."""
        return int(self.values.get("topk_group") or 1)
