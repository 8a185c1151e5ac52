"""Families with experts that this tool does not prune, each with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from tests.families_multimodal import DEEPSEEK, INDEXER, MROPE, SPARSE, composite
from tests.family import Family


@dataclass(frozen=True)
class Refused:
    """A family that is refused by name.

    Attributes:
        family: makes a tiny model of it.
        reason: why, for people.
        message: what the error must say.
        buildable: transformers itself can build the model.
    """

    family: Family
    reason: str
    message: str
    buildable: bool = True


_ENCODER_DECODER = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "num_experts": 8,
    "decoder_start_token_id": 0,
}

REFUSED = [
    Refused(
        Family("doge", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}),
        "its experts are single rows that the router finds by two halves of their number, so that "
        "none of the grid can be left out",
        "DogeForCausalLM.*DogeCDMoE.*no adapter",
    ),
    Refused(
        Family("jetmoe", {"num_local_experts": 8, "num_experts_per_tok": 2, "kv_channels": 8}),
        "attention has experts too, and one number in config.json counts those of both",
        "JetMoeForCausalLM.*JetMoeParallelExperts.*no adapter",
    ),
    Refused(
        Family("switch_transformers", _ENCODER_DECODER, auto="AutoModelForSeq2SeqLM"),
        "an encoder-decoder: text runs through two stacks of layers",
        "language model.*switch_transformers",
    ),
    Refused(
        Family(
            "nllb-moe",
            {
                "d_model": 32,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_sparse_step": 1,
                "decoder_sparse_step": 1,
                "num_experts": 8,
            },
            auto="AutoModelForSeq2SeqLM",
        ),
        "an encoder-decoder: text runs through two stacks of layers",
        "language model.*nllb-moe",
    ),
    Refused(
        composite(
            "ernie4_5_vl_moe",
            {
                "moe_num_experts": 8,
                "moe_k": 2,
                "moe_intermediate_size": [16, 16],
                "moe_num_shared_experts": 1,
                "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]},
            },
        ),
        "each layer has experts for text and experts for images, counted by one number, and "
        "calibration text reaches only the former",
        "several routed-experts modules.*text_moe.*vision_moe.*one number",
    ),
    Refused(
        composite("diffusion_gemma", {"num_experts": 8, "top_k_experts": 2}),
        "an encoder and a decoder that writes blocks of text by diffusion: both have experts, "
        "counted by one number, and text runs through the encoder alone",
        r"text_config\.num_experts.*also count.*model\.decoder",
    ),
    Refused(
        composite(
            "glm5_next",
            {
                **DEEPSEEK,
                **SPARSE,
                "qk_rope_head_dim": 0,
                "head_dim": 0,
                "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
                "linear_head_dim": 8,
                "linear_num_heads": 4,
                **INDEXER,
                "index_kpool": 4,
                "hc_mult": 2,
            },
            {"projection_intermediate_size": 16},
        ),
        "its layers hand on several streams of hidden states, and what they share beside them "
        "cannot be told without running them",
        "Glm5NextForConditionalGeneration cannot be run one by one",
    ),
    Refused(
        Family(
            "gemma4_assistant",
            {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
            text=("text_config",),
            around={"backbone_hidden_size": 32},
        ),
        "a draft model for gemma4: its config forbids experts",
        "cannot build a language model.*gemma4_assistant",
        buildable=False,
    ),
]

REFUSED_BY_ID = {refused.family.id: refused for refused in REFUSED}
