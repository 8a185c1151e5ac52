"""Tiny models of every family the tests reach, as transformers builds them from a config."""

from __future__ import annotations

from typing import Any

from tests import families_engine, families_multimodal
from tests.family import COMMON, MLA, NUM_EXPERTS, Family

__all__ = ["BY_ID", "COMMON", "FAMILIES", "MLA", "NUM_EXPERTS", "Family"]


def _deepseek(**values: Any) -> dict[str, Any]:
    return {
        **MLA,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        **values,
    }


FAMILIES = [
    Family("glm4_moe", {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}),
    Family("glm4_moe_lite", _deepseek(n_group=1, topk_group=1)),
    Family("qwen2_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}),
    Family("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]}),
    Family("qwen3_next", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}),
    Family("qwen3_5_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}, "qwen3_5_moe_text"),
    Family("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    Family("olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
    Family("flex_olmo", {"num_experts": 8, "num_experts_per_tok": 2}),
    Family("deepseek_v2", _deepseek(topk_method="greedy", n_group=1, topk_group=1)),
    Family("deepseek_v3", _deepseek(n_group=2, topk_group=1)),
    Family("gpt_oss", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8}),
    Family("minimax_m2", {"num_local_experts": 8, "num_experts_per_tok": 2, "rotary_dim": 4}),
    Family("ernie4_5_moe", {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1, "moe_layer_start_index": 1}),
    Family("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": 2}),
    Family("phimoe", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    Family("granitemoe", {"num_local_experts": 8, "num_experts_per_tok": 2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    Family("jamba", {"num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4}),
    Family("nemotron_h", {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 24, "n_shared_experts": 1, "layers_block_type": ["mamba", "moe", "attention", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "n_group": 1, "topk_group": 1, "chunk_size": 8, "use_mamba_kernels": False}),
    Family("lfm2_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]}),
    *families_engine.FAMILIES,
    *families_multimodal.FAMILIES,
]  # fmt: skip

BY_ID = {family.id: family for family in FAMILIES}
