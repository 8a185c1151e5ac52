"""Families in which more than hidden states goes from layer to layer, or between them."""

from __future__ import annotations

from typing import Any

from tests.family import INDEXER, MLA, Family

DEEPSEEK: dict[str, Any] = {
    **MLA,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
}

FAMILIES: list[Family] = [
    # A layer's choice of tokens is shared by the next, or not.
    Family("glm_moe_dsa", {**DEEPSEEK, **INDEXER, "n_group": 1, "topk_group": 1, "num_hidden_layers": 5, "indexer_types": ["full", "shared", "full", "shared", "shared"], "mlp_layer_types": ["dense", "sparse", "sparse", "dense", "sparse"]}),
    Family("deepseek_v32", {**DEEPSEEK, **INDEXER, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}),
    # Streams of hidden states; the first layers look experts up by token.
    Family("deepseek_v4", {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "moe_intermediate_size": 16, "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 4, "hc_mult": 2, "hc_sinkhorn_iters": 4, "sliding_window": 8, "num_hidden_layers": 4, "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"], "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention", "compressed_sparse_attention"], "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, "partial_rotary_factor": 0.5}),
    Family("hy_v4", {**DEEPSEEK, **INDEXER, "n_group": 1, "topk_group": 1, "hc_mult": 3}),
    # Hidden states of earlier blocks of layers come back.
    Family("inkling2", {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 8, "d_rel": 4, "rel_extent": 16, "n_layers_per_attn_res_block": 2, "num_hidden_layers": 5}, "inkling2_text"),
    # Tables of n-grams of tokens in a layer.
    Family("qwen4_exp", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [2], "ple_embed_dim": 16, "ngram_vocab_size_base": 64, "heads_per_ngram": 2, "make_ngram_vocab_size_divisible_by": 12, "split_ngram_parts": 12, "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2}, "qwen4_exp_text"),
    # A router's state goes to the next layer's, and it may send a token nowhere.
    Family("zaya", {"num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "router_hidden_size": 16}),
    # Inputs of each layer made of the tokens; keys and values of earlier layers are used again.
    Family("gemma4", {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 1, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"], "sliding_window": 8, "global_head_dim": 8}, "gemma4_text"),
    # Two attentions in a layer, and experts that do nothing.
    Family("longcat_flash", {**MLA, "n_routed_experts": 8, "zero_expert_num": 4, "num_layers": 2, "moe_topk": 3, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16}),
]  # fmt: skip
