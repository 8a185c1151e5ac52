"""The demo's model: GLM-4-MoE as transformers has it, small, and how its router is kept even."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from demo_model.tokens import VOCABULARY

NUM_EXPERTS = 32
# Correction biases move by this much a step towards experts with too few tokens (DeepSeek-V3,
# arXiv 2412.19437, section 2.1.2: no auxiliary loss disturbs the language model's own).
BIAS_STEP = 3e-3


def make_config() -> Glm4MoeConfig:
    """Six layers, of which the first is dense, 32 experts of which 4 a token.

    Widths are multiples of 128, the block of FP8 checkpoints, so that engines load it.
    """
    return Glm4MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=6,
        first_k_dense_replace=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        partial_rotary_factor=0.5,
        use_qk_norm=True,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        num_nextn_predict_layers=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def make_model(seed: int, device: torch.device) -> Glm4MoeForCausalLM:
    """The untrained model, in float32."""
    torch.manual_seed(seed)
    model = Glm4MoeForCausalLM(make_config())
    model.set_experts_implementation("grouped_mm")
    for name, parameter in model.named_parameters():
        # transformers leaves the router's weight uninitialised in some versions.
        if name.endswith("mlp.gate.weight"):
            nn.init.normal_(parameter, std=0.02)
    return model.to(device)


def routers(model: nn.Module) -> list[Any]:
    """The routers of all MoE layers, in order."""
    return [m for name, m in model.named_modules() if hasattr(m, "e_score_correction_bias")]


class Loads:
    """Counts the tokens each expert is sent, by watching the experts modules' arguments."""

    def __init__(self, model: nn.Module) -> None:
        experts = [m for name, m in model.named_modules() if name.endswith("mlp.experts")]
        device = next(model.parameters()).device
        self.counts = torch.zeros(len(experts), NUM_EXPERTS, dtype=torch.int64, device=device)
        for layer, module in enumerate(experts):
            module.register_forward_pre_hook(self._hook(layer), with_kwargs=True)

    def _hook(self, layer: int) -> Any:
        def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = args[1] if len(args) > 1 else kwargs["top_k_index"]
            self.counts[layer] += torch.bincount(index.flatten(), minlength=NUM_EXPERTS)

        return count

    def take(self) -> torch.Tensor:
        """Counts [layers, experts] since they were last taken."""
        counts = self.counts.clone()
        self.counts.zero_()
        return counts


@torch.no_grad()
def balance(model: nn.Module, counts: torch.Tensor) -> None:
    """Moves every correction bias one step towards even loads."""
    for router, load in zip(routers(model), counts, strict=True):
        error = load.float().mean() - load.float()
        router.e_score_correction_bias += BIAS_STEP * error.sign()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs a block without gradients."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
