"""Families of which the language part is pruned, and those whose experts need an adapter."""

from __future__ import annotations

from typing import Any

from tests.family import COMMON, INDEXER, MLA, Family

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_heads": 2,
    "num_attention_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 16,
    "num_channels": 3,
}
# Past the ids of calibration rows, which speak of text alone.
TOKENS: dict[str, Any] = {
    "image_token_id": 100,
    "video_token_id": 101,
    "audio_token_id": 102,
    "vision_start_token_id": 103,
    "vision_end_token_id": 104,
    "image_token_index": 100,
}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
LINEAR: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 24,
}
SHARED: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
DEEPSEEK: dict[str, Any] = {**MLA, **SHARED, "first_k_dense_replace": 1}
AUDIO: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 8,
    "output_dim": 32,
    "n_window": 4,
    "downsample_hidden_size": 8,
    "max_source_positions": 32,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SPEECH: dict[str, Any] = {
    "asr_config": {**TOWER, "num_mel_bins": 8},
    "diarization_config": {
        "head_config": {"hidden_size": 8, "audio_hidden_size": 16},
        "audio_config": {**TOWER, "num_mel_bins": 8},
    },
}
INKLING: dict[str, Any] = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
}
OCR_VISION: dict[str, Any] = {
    "sam_config": {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
        "window_size": 2,
        "global_attn_indexes": [0],
        "mlp_dim": 16,
        "downsample_channels": [16, 16],
    },
    "encoder_config": {**VISION, "num_key_value_heads": 2},
}
NEMOTRON_H: dict[str, Any] = {
    "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 24,
    "layers_block_type": ["mamba", "moe", "attention", "moe"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "use_mamba_kernels": False,
}


def _text(**values: Any) -> dict[str, Any]:
    return {"vocab_size": 112, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **values}


def composite(
    model_type: str,
    values: dict[str, Any],
    vision: dict[str, Any] | None = None,
    *,
    since: str = "",
    **around: Any,
) -> Family:
    """A family whose text part has `values`, whose vision tower some more, and what is around."""
    around = {**TOKENS, **around, "vision_config": {**VISION, **(vision or {})}}
    return Family(
        model_type,
        _text(**values),
        text=("text_config",),
        around=around,
        auto="AutoModelForMultimodalLM",
        since=since,
    )


THINKER: dict[str, Any] = {
    **TOKENS,
    "vision_config": {**VISION, "deepstack_visual_indexes": [0]},
    "audio_config": AUDIO,
}
# A talker has routed experts of its own, as many as the thinker here: text does not reach them.
SPEAKER: dict[str, Any] = {**COMMON, **_text(num_experts=8, rope_parameters=MROPE)}
TALKER: dict[str, Any] = {
    "text_config": {**SPEAKER, "shared_expert_intermediate_size": 16},
    "code_predictor_config": {**SPEAKER, "num_code_groups": 2},
    "num_code_groups": 2,
    "thinker_hidden_size": 32,
    "spatial_merge_size": 2,
    "image_token_id": 100,
    "video_token_id": 101,
    "audio_token_id": 102,
}
CODE2WAV: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "codebook_size": 16,
    "decoder_dim": 32,
    "num_quantizers": 2,
    "upsample_rates": [2],
    "upsampling_ratios": [2],
}

LLAMA4: dict[str, Any] = {
    "num_local_experts": 8,
    "intermediate_size_mlp": 48,
    "attention_chunk_size": 8,
}

FAMILIES: list[Family] = [
    composite("qwen3_vl_moe", {"num_experts": 8, "rope_parameters": MROPE}, {"deepstack_visual_indexes": [0]}),
    composite("qwen3_5_moe", {"num_experts": 8, **LINEAR}),
    composite("qwen3_omni_moe_thinker", {"num_experts": 8, "rope_parameters": MROPE}, {"deepstack_visual_indexes": [0]}, audio_config=AUDIO),
    Family("qwen3_omni_moe", _text(num_experts=8, rope_parameters=MROPE), text=("thinker_config", "text_config"), around={"thinker_config": THINKER, "talker_config": TALKER, "code2wav_config": CODE2WAV}, auto="AutoModelForMultimodalLM"),
    composite("qwen4_exp", {"num_experts": 8, **LINEAR, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4, "hc_count": 2, "hc_lowrank": 8}),
    composite("glm4v_moe", {**SHARED, "first_k_dense_replace": 1, "rope_parameters": {**MROPE, "mrope_section": [1, 1], "partial_rotary_factor": 0.5}}),
    composite("gemma4", {"num_experts": 8, "top_k_experts": 2, "enable_moe_block": True, "sliding_window": 8, "hidden_size_per_layer_input": 0}),
    composite("aria", {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1}, since="5.23"),
    composite("kimi_k25", {"model_type": "deepseek_v3", **DEEPSEEK, "num_nextn_predict_layers": 0}),
    composite("deepseek_ocr2", {**SHARED, **SPARSE}, OCR_VISION),
    composite("unlimited_ocr", {**SHARED, **SPARSE, "sliding_window": 8}, OCR_VISION),
    composite("dots3_note", {**DEEPSEEK, **INDEXER, "sliding_window": 8, "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"], "head_dim": 16, "shared_experts_intermediate_size": 16, "per_layer_config": {}}, {"adapter_in_dim": 16, "adapter_out_dim": 32, "moe_intermediate_size": 8, "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 8, "num_experts_per_tok": 2}, audio_config={**VISION, "adapter_input_size": 16, "adapter_out_dim": 32, "feature_size": 8, "downsample_hidden_size": 8}),
    composite("inkling2", {"n_routed_experts": 8, **INKLING, "n_layers_per_attn_res_block": 2, "unpadded_vocab_size": 112}, {"text_hidden_size": 32, "projection_hidden_dim": 16, "posemb_grid_size": 4}),
    composite("minimax_m3_vl", {"num_local_experts": 8, "dense_intermediate_size": 48, "shared_intermediate_size": 16, "rotary_dim": 4, "index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 2, **SPARSE}, projector_hidden_size=16),
    composite("mistral_large4", {**DEEPSEEK, **INDEXER, "head_dim": 16}),
    composite("muse_spark", {"num_local_experts": 8, "moe_hidden_size": 16, "sliding_window": 8, **SPARSE}, {"pos_emb_height": 4, "pos_emb_width": 4}, out_hidden_size=24, projector_hidden_size=16, audio_config={"patch_sizes": [4], "hidden_sizes": [8], "depths": [1], "num_hidden_layers": 1, "out_hidden_size": 32}),
    composite("internvl", {"model_type": "qwen3_moe", "num_experts": 8}),
    composite("llava", {"model_type": "mixtral", "num_local_experts": 8}),
    # Older releases normalise its embeddings twice.
    composite("inkling_mm_model", {"n_routed_experts": 8, "n_shared_experts": 1, **INKLING, **SPARSE, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"]}, {"text_hidden_size": 32, "patch_size": 2, "num_hidden_layers": 6, "n_layers": 6}, audio_config={"text_hidden_size": 32, "n_mel_bins": 8, "mel_vocab_size": 16}, since="5.23"),
    composite("nemo_speechlm", {"model_type": "nemotron_h", "n_routed_experts": 8, "n_group": 1, "topk_group": 1, **NEMOTRON_H}, audio_token_id=100, audio_config=SPEECH, word_timestamp_config={**TOWER, "vocab_size": 16, "blank_token_id": 15}),
    Family("mistral4", {**_text(), **DEEPSEEK, "head_dim": 16}, auto="AutoModelForMultimodalLM"),
    composite("mistral3", {"model_type": "mistral4", **DEEPSEEK, "head_dim": 16}),
    composite("lfm2_vl", {"model_type": "lfm2_moe", "num_experts": 8, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]}, {"model_type": "siglip2_vision_model"}, projector_hidden_size=16),
    composite("nemotron_h_omni", {"model_type": "nemotron_h", "n_routed_experts": 8, "n_group": 1, "topk_group": 1, **NEMOTRON_H}, {"video_temporal_patch_size": 2, "max_img_size": 16}, projector_hidden_size=16, vision_hidden_size=16),
    composite("step3p7", {"num_local_experts": 8, "n_routed_experts": 8, "share_expert_dim": 16, **SPARSE, "swiglu_limits": [0, 0, 0.1], "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    composite("llama4", {**LLAMA4, "num_hidden_layers": 4, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 1, 0]}, {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}),
    Family("llama4", _text(**LLAMA4, interleave_moe_layer_step=1), "llama4_text"),
    Family("dbrx", {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128, "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2}, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}, count="ffn_config.moe_num_experts"),
]  # fmt: skip
