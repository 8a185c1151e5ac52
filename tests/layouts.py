"""The spellings in which checkpoints are published: names, shapes of experts, keys of config.json.

Nothing here asks transformers how it would spell a checkpoint: names are those of the files on the
Hub, so a layout that transformers reads but no longer writes is still tested.
"""

from __future__ import annotations

from tests.layout_spelling import W123, Layout

_BLOCK = (r"\.mlp\.(experts|gate|router|e_score)", r".block_sparse_moe.\1")
_KDA = (r"self_attn\.forget_gate\.", "self_attn.")

# DeepSeek's own names, which their later models are published with.
_DEEPSEEK = (
    (r"^model\.embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^model\.hc_head\.hc_", "hc_head_"),
    (r"^model\.", ""),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
    (r"compressor\.indexer\.scorer\.", "indexer."),
    (r"compressor\.indexer\.q_b_proj", "indexer.wq_b"),
    (r"compressor\.indexer\.", "indexer.compressor."),
    (r"compressor\.kv_norm", "compressor.norm"),
    (r"compressor\.gate_proj", "compressor.wgate"),
    (r"position_bias", "ape"),
    (r"(attn|compressor)\.kv_proj", r"\1.wkv"),
    (r"\.(q|o)_(a|b)_proj", r".w\1_\2"),
    (r"q_a_norm", "q_norm"),
    (r"\.sinks", ".attn_sink"),
    (r"input_layernorm", "attn_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"gate\.e_score_correction_bias", "gate.bias"),
    (r"shared_experts\.gate_proj", "shared_experts.w1"),
    (r"shared_experts\.down_proj", "shared_experts.w2"),
    (r"shared_experts\.up_proj", "shared_experts.w3"),
)

LAYOUTS = {
    "mixtral": Layout(
        "mixtral",
        (
            "model.layers.0.block_sparse_moe.gate.weight",
            "model.layers.0.block_sparse_moe.experts.7.w1.weight",
            "model.layers.2.block_sparse_moe.experts.0.w2.weight",
        ),
        W123,
        (_BLOCK,),
        config={"num_local_experts": 8},
    ),
    "minimax-m1": Layout(
        "minimax",
        (
            "model.layers.0.block_sparse_moe.gate.weight",
            "model.layers.1.block_sparse_moe.experts.3.w3.weight",
            "model.layers.1.self_attn.qkv_proj.weight",
        ),
        W123,
        (_BLOCK,),
    ),
    "minimax-m2": Layout(
        "minimax_m2",
        (
            "model.layers.0.block_sparse_moe.e_score_correction_bias",
            "model.layers.0.block_sparse_moe.gate.weight",
            "model.layers.0.block_sparse_moe.experts.0.w1.weight",
        ),
        W123,
        (_BLOCK,),
        config={"num_mtp_modules": 3, "use_mtp": False, "attn_type_list": [1, 1, 1]},
    ),
    "phi-3.5-moe": Layout(
        "phimoe",
        ("model.layers.0.block_sparse_moe.gate.weight",),
        W123,
        (_BLOCK, (r"block_sparse_moe\.router\.", "block_sparse_moe.gate.")),
    ),
    "ernie-4.5": Layout(
        "ernie4_5_moe",
        (
            "model.layers.1.mlp.moe_statics.e_score_correction_bias",
            "model.layers.1.mlp.gate.weight",
            "model.layers.2.mlp.experts.7.down_proj.weight",
        ),
        renames=((r"mlp\.gate\.moe_statics", "mlp.moe_statics"),),
        config={"moe_capacity": [8, 8, 8], "moe_num_experts": 8},
    ),
    "ling-hybrid": Layout(
        "bailing_hybrid",
        (
            "model.word_embeddings.weight",
            "model.layers.1.mlp.gate.expert_bias",
            "model.layers.1.attention.dense.weight",
            "model.layers.0.attention.q_conv1d.weight",
        ),
        renames=(
            ("embed_tokens", "word_embeddings"),
            ("e_score_correction_bias", "expert_bias"),
            _KDA,
            (r"(layers\.[13]\.)self_attn\.o_proj", r"\1self_attn.dense"),
            (r"self_attn\.", "attention."),
        ),
        splits_convolution=True,
    ),
    "kimi-linear": Layout(
        "kimi_linear",
        (
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.1.block_sparse_moe.gate.e_score_correction_bias",
            "model.layers.1.block_sparse_moe.experts.0.w1.weight",
            "model.layers.1.block_sparse_moe.shared_experts.up_proj.weight",
            "model.layers.0.self_attn.A_log",
        ),
        W123,
        ((r"\.mlp\.(experts|gate|shared_experts)\.", r".block_sparse_moe.\1."), _KDA),
        splits_convolution=True,
        config={
            "linear_attn_config": {
                "full_attn_layers": [2],
                "kda_layers": [1, 3],
                "head_dim": 8,
                "num_heads": 4,
                "short_conv_kernel_size": 4,
            },
            "first_k_dense_replace": 1,
            "layer_types": None,
            "mlp_layer_types": None,
        },
    ),
    "qwen3": Layout(
        "qwen3_moe",
        ("model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.0.gate_proj.weight"),
        config={"num_local_experts": None, "num_experts": 8},
    ),
    "qwen2": Layout(
        "qwen2_moe",
        ("model.layers.0.mlp.shared_expert_gate.weight",),
        config={"num_local_experts": None, "num_experts": 8},
    ),
    "glm-4.5": Layout("glm4_moe", ("model.layers.1.mlp.gate.e_score_correction_bias",)),
    "deepseek-v3": Layout("deepseek_v3", ("model.layers.1.mlp.gate.e_score_correction_bias",)),
    "deepseek-v4": Layout(
        "deepseek_v4",
        (
            "embed.weight",
            "hc_head_fn",
            "layers.0.ffn.gate.tid2eid",
            "layers.1.attn.indexer.compressor.wkv.weight",
            "layers.1.attn.kv_norm.weight",
            "layers.2.ffn.experts.7.w2.weight",
            "layers.3.ffn.gate.bias",
        ),
        W123,
        _DEEPSEEK,
        config={
            "mlp_layer_types": None,
            "num_hash_layers": 2,
            "layer_types": None,
            "compress_ratios": [128, 4, 0, 4],
            "compress_rates": None,
            "compress_rate_csa": 4,
            "compress_rate_hca": 8,
            "partial_rotary_factor": None,
            "qk_rope_head_dim": 8,
        },
    ),
    "glm-5": Layout(
        "glm_moe_dsa",
        (
            "model.layers.1.mlp.experts.0.gate_proj.weight",
            "model.layers.0.self_attn.indexer.weights_proj.weight",
        ),
    ),
    "hunyuan-a13b": Layout(
        "hunyuan_v1_moe",
        ("model.layers.0.mlp.gate.wg.weight", "model.layers.0.mlp.shared_mlp.up_proj.weight"),
        config={"num_experts": 8, "moe_topk": [2, 2, 2], "num_shared_expert": [1, 1, 1]},
    ),
    "hy3": Layout(
        "hy_v3",
        (
            "model.layers.1.mlp.router.gate.weight",
            "model.layers.1.mlp.expert_bias",
            "model.layers.1.mlp.shared_mlp.up_proj.weight",
        ),
        renames=(
            (r"mlp\.gate\.weight", "mlp.router.gate.weight"),
            ("e_score_correction_bias", "expert_bias"),
            (r"mlp\.shared_experts\.", "mlp.shared_mlp."),
        ),
    ),
    "exaone": Layout(
        "exaone_moe",
        ("model.layers.1.mlp.e_score_correction_bias", "model.layers.1.mlp.gate.weight"),
        renames=((r"mlp\.gate\.e_score", "mlp.e_score"),),
    ),
    "nemotron-3": Layout(
        "nemotron_h",
        (
            "backbone.embeddings.weight",
            "backbone.layers.1.mixer.gate.e_score_correction_bias",
            "backbone.layers.1.mixer.experts.0.up_proj.weight",
        ),
        renames=(("^model.", "backbone."),),
    ),
    "lfm2": Layout(
        "lfm2_moe",
        (
            "model.layers.1.feed_forward.expert_bias",
            "model.layers.1.feed_forward.experts.0.w1.weight",
        ),
        W123,
    ),
    "granite-4": Layout(
        "granitemoehybrid",
        (
            "model.layers.0.block_sparse_moe.input_linear.weight",
            "model.layers.0.block_sparse_moe.output_linear.weight",
            "model.layers.0.block_sparse_moe.router.layer.weight",
        ),
        None,
        (
            (r"experts\.gate_up_proj", "input_linear.weight"),
            (r"experts\.down_proj", "output_linear.weight"),
            (r"router\.weight", "router.layer.weight"),
        ),
    ),
    "gpt-oss": Layout(
        "gpt_oss",
        ("model.layers.0.mlp.experts.gate_up_proj_bias", "model.layers.0.mlp.router.bias"),
        None,
        config={"num_local_experts": 8, "experts_per_token": 2},
    ),
}
