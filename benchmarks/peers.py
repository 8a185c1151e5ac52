"""The same pruning by reap_stream and by llmcompressor, in turn, in one run.

    python benchmarks/peers.py [--directory D] [--peer-python VENV/bin/python]

Work: random Qwen3-MoE (0.85 B) and GLM-4-MoE (0.76 B) checkpoints in bfloat16, hidden 1024, 64
experts of width 512, 8 per token, 8 layers; 32 × 512 token ids; 50 % of the experts removed.
Reported for each: wall time and peak resident memory of the whole process, the share of kept
experts that a float32 reference keeps too (the experts call of the whole model, hooked), and
whether transformers loads the output with every key in its place.

Without --peer-python a virtual environment is made in the directory and llmcompressor 0.14.0.1 is
installed into it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROWS, TOKENS, VOCABULARY, LAYERS, EXPERTS = 32, 512, 32000, 8, 64
KEEP = EXPERTS // 2
COMMON = {
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MODELS = {
    "qwen3_moe": {"num_experts": EXPERTS, "norm_topk_prob": True, "intermediate_size": 3072},
    "glm4_moe": {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "intermediate_size": 3072,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": True,
    },
}
PEER = """
import json, sys
import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import REAPPruningModifier
source, tokens, out, mode = sys.argv[1:5]
rows = np.load(tokens)
if mode == "offload":
    from compressed_tensors.offload import load_offloaded_model
    with load_offloaded_model():
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", device_map="auto_offload", max_memory={},
            offload_folder=out + "-offload",
        )
else:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
data = Dataset.from_dict(
    {"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()}
)
oneshot(
    model=model,
    tokenizer=AutoTokenizer.from_pretrained(source),
    dataset=data,
    recipe=REAPPruningModifier(sparsity=0.5, report_path=out + ".json"),
    max_seq_length=rows.shape[1],
    num_calibration_samples=rows.shape[0],
    moe_calibrate_all_experts=False,
)
model.save_pretrained(out, save_compressed=True)
"""


def main() -> None:
    """Makes the checkpoints, runs both, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--memory", default="640MiB", help="budget of the small run")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--reference", nargs=3, metavar=("NAME", "DIR", "TOKENS"), help=argparse.SUPPRESS
    )
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reference:
        name, source, tokens = arguments.reference
        if not (Path(source) / "config.json").exists():
            make_model(name, Path(source))
        print(json.dumps(reference_scores(Path(source), Path(tokens))))
        return
    if arguments.check:
        print(json.dumps(loads(arguments.check)))
        return
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="reap-peers-"))
    directory.mkdir(parents=True, exist_ok=True)
    peer = arguments.peer_python or install_peer(directory)
    results = {name: compare(name, directory, peer, arguments.memory) for name in arguments.models}
    print(json.dumps(results) if arguments.json else table(results))
    if arguments.directory is None:
        shutil.rmtree(directory)


def install_peer(directory: Path) -> Path:
    """A virtual environment with llmcompressor in it."""
    python = directory / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory / "venv")], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, "llmcompressor==0.14.0.1"], check=True)
    return python


def compare(name: str, directory: Path, peer: Path, memory: str) -> dict[str, Any]:
    """One model: the reference, then every way of pruning it."""
    source, tokens = directory / name, directory / "tokens.npy"
    rng = np.random.default_rng(0)
    np.save(tokens, rng.integers(10, VOCABULARY, size=(ROWS, TOKENS)))
    # In a process of its own: a child's peak memory counts what its parent held when it began.
    scores = own_process("--reference", name, str(source), str(tokens))
    reference = {int(layer): np.array(values) for layer, values in scores.items()}
    script = directory / "peer.py"
    script.write_text(PEER)
    ours = [sys.executable, "-m", "reap_stream", "prune", str(source), "--sparsity", "0.5"]
    ours += ["--calibration", str(tokens), "--output", str(directory / "out")]
    theirs = [str(peer), str(script), str(source), str(tokens), str(directory / "out")]
    ways = {
        "reap_stream": ours,
        f"reap_stream --memory {memory}": [*ours, "--memory", memory],
        "reap_stream --compute-dtype float32": [*ours, "--compute-dtype", "float32"],
        "llmcompressor": [*theirs, "plain"],
        "llmcompressor, offloaded to disk": [*theirs, "offload"],
    }
    return {way: measure(command, directory, reference) for way, command in ways.items()}


def measure(command: list[str], directory: Path, reference: dict[int, list[int]]) -> dict[str, Any]:
    """Runs a command and looks at what it wrote."""
    out = directory / "out"
    shutil.rmtree(out, ignore_errors=True)
    log = (directory / "log.txt").open("w")
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=directory)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    result: dict[str, Any] = {"seconds": seconds, "peak_nbytes": usage.ru_maxrss * 1024}
    if status != 0:
        log.close()
        lines = (directory / "log.txt").read_text().strip().splitlines()
        return {**result, "failed": lines[-1] if lines else str(status)}
    kept = read_kept(out)
    shared, worst = 0, 0.0
    for layer, scores in reference.items():
        best = np.argsort(-scores, kind="stable")[:KEEP]
        shared += len(set(kept[layer]) & set(best.tolist()))
        lost = scores[sorted(set(best.tolist()) - set(kept[layer]))]
        cut = scores[best[-1]]
        worst = max(worst, *((lost - cut) / cut), 0.0) if len(lost) else worst
    result["overlap"] = shared / (KEEP * len(reference))
    result["worst_loss"] = worst
    result["loads"] = own_process("--check", str(out))
    return result


def own_process(*arguments: str) -> Any:
    """Runs a part of this script in a process of its own and returns what it found."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(done.stdout.splitlines()[-1])


def read_kept(out: Path) -> dict[int, list[int]]:
    """Kept experts by layer, as either tool reports them."""
    own = out / "reap" / "kept_experts.json"
    if own.exists():
        return {int(k): v for k, v in json.loads(own.read_text())["kept"].items()}
    report = json.loads(Path(f"{out}.json").read_text())
    layers = {}
    for name, experts in report.items():
        number = next(part for part in name.split(".") if part.isdigit())
        layers[int(number)] = experts
    return layers


def loads(out: Path) -> bool:
    """Whether transformers loads a checkpoint with no key missing, left over or of another shape."""
    from transformers import AutoModelForCausalLM

    try:
        _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    except (RuntimeError, ValueError, OSError):
        return False
    return not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def make_model(name: str, directory: Path) -> None:
    """A random checkpoint with a tokenizer, as transformers writes it."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **COMMON, **MODELS[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(directory)


def reference_scores(source: Path, tokens: Path) -> dict[int, list[float]]:
    """REAP on the whole model in float32: every expert's output on its own tokens, hooked."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    sums: dict[int, Any] = {}

    def hook(layer: int) -> Any:
        def add(module: Any, arguments: tuple[Any, ...], _: Any) -> None:
            hidden, index, weights = arguments
            for expert in range(EXPERTS):
                token, slot = torch.where(index == expert)
                up = hidden[token] @ module.gate_up_proj[expert].T
                gate, value = up.chunk(2, dim=-1)
                rows = (module.act_fn(gate) * value) @ module.down_proj[expert].T
                norms = rows.double().norm(dim=-1) * weights[token, slot].double()
                sums[layer][0][expert] += norms.sum()
                sums[layer][1][expert] += len(token)

        return add

    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            layer = int(name.split(".")[2])
            sums[layer] = torch.zeros(2, EXPERTS, dtype=torch.float64)
            module.register_forward_hook(hook(layer))
    with torch.inference_mode():
        for row in np.load(tokens):
            model.model(torch.from_numpy(row)[None], use_cache=False)
    return {layer: (total / count.clamp(min=1)).tolist() for layer, (total, count) in sums.items()}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The results as lines of text."""
    lines = []
    for name, ways in results.items():
        first = next(iter(ways.values()))
        for way, r in ways.items():
            figures = f"{r['seconds']:.1f} s, {r['peak_nbytes'] / 1e6:.0f} MB"
            ratio = f"{r['seconds'] / first['seconds']:.2f} × the time"
            ratio += f", {r['peak_nbytes'] / first['peak_nbytes']:.2f} × the memory"
            end = r.get("failed") or (
                f"overlap {r['overlap']:.3f}, best expert lost {100 * r['worst_loss']:.2f} % above the cut, "
                f"loads: {r['loads']}"
            )
            lines.append(f"{name}: {way}: {figures} ({ratio}); {end}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
