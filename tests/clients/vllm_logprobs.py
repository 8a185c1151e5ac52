"""Log-probabilities of a checkpoint's prompts by vLLM on a CPU in float32.

    python vllm_logprobs.py DIR TOKENS.json OUT.npz [--mtp]

Runs in vLLM's own environment and imports nothing of the tests. Every parameter is NaN before
vLLM loads: one that no tensor reaches shows in the numbers. FP8 weights are loaded by vLLM's own
code and then run as the float32 values that they stand for, because its CPU kernels for them need
instructions that few machines have and round the activations. OUT.npz: ``row_N`` [tokens,
vocabulary], and with --mtp ``draft_N`` of the MTP layer, which is loaded for speculative decoding.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Read when vLLM is imported. One process: what is replaced below is replaced for the engine too.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import fp8
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8 as channel_moe,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_w8a8_fp8 as channel_linear,
)
from vllm.model_executor.model_loader import base_loader
from vllm.model_executor.models.glm4_moe_mtp import Glm4MoeMTP

Arrays = dict[str, np.ndarray[Any, Any]]
BLOCK = 128


def poison_parameters() -> None:
    """Makes every parameter NaN between a model's making and its loading."""
    initialise = base_loader.initialize_model

    def initialise_with_nan(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model = initialise(*args, **kwargs)
        for name, parameter in model.named_parameters():
            # Scales of an FP8 key-value cache, which these checkpoints do not have.
            if not name.endswith((".k_scale", ".v_scale", ".q_scale", ".prob_scale")):
                parameter.data.copy_(
                    torch.full_like(parameter.data, float("nan"), dtype=torch.float32)
                )
        return model

    base_loader.initialize_model = initialise_with_nan


def compute_fp8_in_float32() -> None:
    """Turns FP8 layers into unquantised ones after vLLM has loaded their weights and scales."""
    for config in (fp8.Fp8Config, compressed_tensors.CompressedTensorsConfig):
        config.get_supported_act_dtypes = classmethod(lambda _cls: [torch.float32])
    for module in (fp8, channel_linear):
        module.init_fp8_linear_kernel = lambda **_kwargs: SimpleNamespace()
    channel_linear.expose_input_quant_key = lambda *_args: None
    for module in (fp8, channel_moe):
        module.select_fp8_moe_backend = lambda **_kwargs: (None, None)
    process = base_loader.process_weights_after_loading

    def decode_and_process(model: torch.nn.Module, *args: Any) -> None:
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(module, LinearBase) and not isinstance(method, UnquantizedLinearMethod):
                _decode(module, "weight")
                module.quant_method = UnquantizedLinearMethod()
            elif hasattr(module, "w13_weight") and not isinstance(
                method, UnquantizedFusedMoEMethod
            ):
                _decode(module, "w13_weight")
                _decode(module, "w2_weight")
                module._replace_quant_method(UnquantizedFusedMoEMethod(module.moe_config))
        process(model, *args)

    base_loader.process_weights_after_loading = decode_and_process


def _decode(module: torch.nn.Module, name: str) -> None:
    codes = getattr(module, name).data
    if f"{name}_scale_inv" in module._parameters:
        scale = module._parameters.pop(f"{name}_scale_inv").data
        scale = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
        scale = scale[..., : codes.shape[-2], : codes.shape[-1]]
    else:
        scale = module._parameters.pop(f"{name}_scale").data
    value = torch.nn.Parameter(codes.float() * scale.float(), requires_grad=False)
    module._parameters[name] = value


def record_drafts() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keeps positions [tokens] and logits [tokens, vocabulary] of each call of the MTP layer."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    forward = Glm4MoeMTP.forward

    def forward_and_keep(
        self: Any, input_ids: Any, positions: Any, *args: Any, **kwargs: Any
    ) -> Any:
        hidden = forward(self, input_ids, positions, *args, **kwargs)
        calls.append((positions.clone(), self.compute_logits(hidden).clone()))
        return hidden

    Glm4MoeMTP.forward = forward_and_keep
    return calls


def main(directory: str, tokens: str, out: str, mtp: bool) -> None:
    """Loads the checkpoint and writes the arrays."""
    prompts: list[list[int]] = json.loads(Path(tokens).read_text(encoding="utf-8"))
    poison_parameters()
    compute_fp8_in_float32()
    calls = record_drafts()
    speculative = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
    engine = LLM(
        model=directory,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
        max_logprobs=-1,
        enable_prefix_caching=False,
        **(speculative if mtp else {}),
    )
    arrays: Arrays = {}
    for number, prompt in enumerate(prompts):
        calls.clear()
        arrays[f"row_{number}"] = _row(engine, prompt)
        if mtp:
            positions, logits = next(call for call in calls if len(call[0]) >= len(prompt))
            assert positions[: len(prompt)].tolist() == list(range(len(prompt)))
            arrays[f"draft_{number}"] = logits[: len(prompt)].double().log_softmax(-1).numpy()
    np.savez(out, **arrays)


def _row(engine: LLM, prompt: list[int]) -> np.ndarray[Any, Any]:
    """[tokens, vocabulary]: those within the prompt, and that of the token after it."""
    parameters = SamplingParams(
        temperature=0, max_tokens=2, prompt_logprobs=-1, logprobs=-1, detokenize=False
    )
    (answer,) = engine.generate({"prompt_token_ids": prompt}, parameters, use_tqdm=False)
    given = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
    return np.array([[row[token].logprob for token in sorted(row)] for row in given])


if __name__ == "__main__":
    main(*sys.argv[1:4], mtp="--mtp" in sys.argv)
