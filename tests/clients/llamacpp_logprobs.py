"""Log-probabilities of a checkpoint's prompts by llama.cpp, converted to GGUF in float32.

    python llamacpp_logprobs.py DIR TOKENS.json OUT.npz

Runs in llama.cpp's own environment (make_env.py) and imports nothing of the tests. The converter is
run as it is but for the vocabulary: it knows tokenizers of published models only, and token ids are
all that is compared. OUT.npz: ``row_N`` [tokens, vocabulary].
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

CONVERTER = Path(sys.prefix) / "llama.cpp" / "convert_hf_to_gguf.py"


def convert(directory: str, config: dict[str, Any], gguf: Path) -> None:
    """The converter's own command line."""
    sys.path.insert(0, str(CONVERTER.parent))
    from conversion import get_model_class

    def no_vocabulary(self: Any) -> None:
        self._set_vocab_none()
        self.gguf_writer.add_vocab_size(config["vocab_size"])

    get_model_class(config["architectures"][0]).set_vocab = no_vocabulary
    sys.argv = ["convert", directory, "--outfile", str(gguf), "--outtype", "f32"]
    runpy.run_path(str(CONVERTER), run_name="__main__")


def main(directory: str, tokens: str, out: str) -> None:
    """Converts, loads, and writes the arrays."""
    prompts: list[list[int]] = json.loads(Path(tokens).read_text(encoding="utf-8"))
    gguf = Path(out).with_suffix(".gguf")
    config = json.loads((Path(directory) / "config.json").read_bytes())
    convert(directory, config, gguf)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(gguf).encode(), llama_cpp.llama_model_default_params()
    )
    assert model, f"llama.cpp did not load {gguf}"
    rows = [_row(model, prompt, config["vocab_size"]) for prompt in prompts]
    np.savez(out, **{f"row_{number}": row for number, row in enumerate(rows)})
    gguf.unlink()


def _row(model: Any, prompt: list[int], vocabulary: int) -> np.ndarray[Any, Any]:
    """[tokens, vocabulary]: of the next token behind each token of the prompt."""
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 256
    parameters.n_threads = parameters.n_threads_batch = 2
    parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, parameters)
    batch = llama_cpp.llama_batch_init(len(prompt), 0, 1)
    batch.n_tokens = len(prompt)
    for position, token in enumerate(prompt):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        batch.logits[position] = 1
    assert llama_cpp.llama_decode(context, batch) == 0
    logits = np.ctypeslib.as_array(
        llama_cpp.llama_get_logits(context), (len(prompt), vocabulary)
    ).astype(np.float64)
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    main(*sys.argv[1:4])
