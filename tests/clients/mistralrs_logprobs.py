"""Log-probabilities of a checkpoint's prompts by mistral.rs on a CPU in float32.

    python mistralrs_logprobs.py DIR TOKENS.json OUT.npz

Runs in mistral.rs's own environment (make_env.py) and imports nothing of the tests. It tells
probabilities of tokens that it generates only, so every prefix of a prompt is a prompt of its own.
OUT.npz: ``row_N`` [tokens, vocabulary].
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Read when the model is loaded: keys and values are rounded to half precision otherwise.
os.environ["MISTRALRS_CPU_KV_F32"] = "1"

import numpy as np
from mistralrs import Architecture, ChatCompletionRequest, ModelDType, Runner, Which

ARCHITECTURES = {"qwen3_moe": Architecture.Qwen3Moe, "glm4_moe": Architecture.GLM4Moe}


def main(directory: str, tokens: str, out: str) -> None:
    """Loads the checkpoint and writes the arrays."""
    prompts: list[list[int]] = json.loads(Path(tokens).read_text(encoding="utf-8"))
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    # It takes no prompt without a chat template: one that adds nothing.
    template = Path(out).with_suffix(".jinja")
    template.write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    runner = Runner(
        which=Which.Plain(
            model_id=directory,
            arch=ARCHITECTURES[config["model_type"]],
            dtype=ModelDType.F32,
        ),
        no_paged_attn=True,
        prefix_cache_n=0,
        jinja_explicit=str(template),
    )
    rows = [
        np.array(
            [_after(runner, prompt[: end + 1], config["vocab_size"]) for end in range(len(prompt))]
        )
        for prompt in prompts
    ]
    np.savez(out, **{f"row_{number}": row for number, row in enumerate(rows)})


def _after(runner: Any, prompt: list[int], vocabulary: int) -> np.ndarray[Any, Any]:
    """[vocabulary]: of the token after the prompt."""
    request = ChatCompletionRequest(
        messages=" ".join(f"t{token}" for token in prompt),
        model="default",
        logprobs=True,
        top_logprobs=vocabulary,
        max_tokens=1,
        temperature=0.0,
    )
    answer = runner.send_chat_completion_request(request)
    assert answer.usage.prompt_tokens == len(prompt), answer.usage.prompt_tokens
    row = np.full(vocabulary, np.nan)
    for one in answer.choices[0].logprobs.content[0].top_logprobs:
        row[one.token] = one.logprob
    return row


if __name__ == "__main__":
    main(*sys.argv[1:4])
