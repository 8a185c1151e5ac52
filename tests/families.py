"""Tiny models of every family the tests reach, as transformers builds them from a config."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests import families_engine, families_multimodal
from tests.family import COMMON, INDEXER, MLA, NUM_EXPERTS, Family

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


LINEAR: dict[str, Any] = {"linear_num_heads": 4, "linear_head_dim": 8}

LISTED = [
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
    Family("afmoe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 8, "global_attn_every_n_layers": 2}),
    Family("aria", {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1}, "aria_text", since="5.23"),
    Family("axk1", _deepseek(n_group=2, topk_group=1)),
    Family("axk2", _deepseek(**INDEXER, gated_norm_rank=4)),
    Family("bailing_hybrid", {**MLA, **LINEAR, "num_hidden_layers": 4, "layer_group_size": 2, "num_experts": 8, "num_experts_per_token": 2, "num_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_expert_group": 2, "topk_group": 1, "num_nextn_predict_layers": 0}),
    Family("beam", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1, "sliding_window": 8, "mlp_layer_types": ["dense", "sparse", "sparse"], "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    Family("cohere2_moe", {"num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1, "sliding_window": 8, "sliding_window_pattern": 2}),
    Family("dots1", _deepseek(n_group=1, topk_group=1, num_key_value_heads=2)),
    Family("dots3_note", _deepseek(**INDEXER, sliding_window=8, layer_types=["indexed_attention", "sliding_attention", "indexed_attention"], n_group=1, topk_group=1, head_dim=16, shared_experts_intermediate_size=16, per_layer_config={}), "dots3_note_text"),
    Family("exaone_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_shared_experts": 1, "sliding_window": 8, "sliding_window_pattern": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}),
    Family("flint", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0], "sliding_window": 8}),
    Family("granitemoe_swa", {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 16, "sliding_window": 8}),
    Family("granitemoehybrid", {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8}),
    Family("granitemoeshared", {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 16}),
    Family("hy_v3", {"num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse", "sparse"]}),
    Family("inkling", {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 2, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 8, "d_rel": 4, "rel_extent": 16}, "inkling_text"),
    Family("kimi_linear", {**MLA, **LINEAR, "num_experts": 8, "num_experts_per_token": 2, "num_shared_experts": 1, "moe_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse", "sparse"], "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    Family("kolibri1", {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "sliding_window": 8}),
    Family("laguna", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse", "sparse"], "num_attention_heads_per_layer": [4, 4, 4]}),
    Family("mellum", {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    Family("mimo_v2_flash", {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "v_head_dim": 8, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse", "sparse"]}),
    Family("minimax", {"num_local_experts": 8, "num_experts_per_tok": 2, "block_size": 16}),
    Family("minimax_m3_vl", {"num_local_experts": 8, "num_experts_per_tok": 2, "dense_intermediate_size": 48, "shared_intermediate_size": 16, "rotary_dim": 4, "index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 2, "mlp_layer_types": ["dense", "sparse", "sparse"]}, "minimax_m3_vl_text"),
    Family("solar_open", {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}),
    *families_engine.FAMILIES,
    *families_multimodal.FAMILIES,
]  # fmt: skip

# Those that the installed transformers has and runs: an older one lacks some.
_INSTALLED = Version(transformers.__version__)
FAMILIES = [
    family
    for family in LISTED
    if family.id in CONFIG_MAPPING_NAMES and Version(family.since or "0") <= _INSTALLED
]
BY_ID = {family.id: family for family in FAMILIES}
