"""Prune a checkpoint of GLM-4.6's widths: memory, bytes, and how near the pass is to bare products.

    python benchmarks/glm46_width.py --directory /path/with/40GB/free

Makes a checkpoint with GLM-4.6's layer widths (hidden 5120, 160 experts of width 1536, 96/8 heads,
FP8 by channel, one dense layer, two MoE layers, one MTP layer, 12 GB; fewer layers and a smaller
vocabulary than the real one), prunes 40 % of the experts with 16 × 512 tokens in a process of its
own, once with the memory there is and once with a budget, and times bare matrix products of the
same shapes in the same run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, EXPERTS, WIDTH, DENSE_WIDTH = 5120, 160, 1536, 12288
HEADS, KV_HEADS, HEAD_DIM = 96, 8, 128
VOCABULARY, LAYERS = 32768, 3
ROWS, ROW_TOKENS = 16, 512
SHARD_NBYTES = 4 * 10**9
POOL_NBYTES = 1 << 28

CONFIG = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE_WIDTH,
    "max_position_embeddings": 202752,
    "moe_intermediate_size": WIDTH,
    "n_group": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": HEADS,
    "num_experts_per_tok": 8,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_qk_norm": True,
    "vocab_size": VOCABULARY,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "channel",
                    "dynamic": False,
                    "symmetric": True,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*eh_proj$"],
    },
}


def main() -> None:
    """Makes, prunes, reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, help="scratch space, 40 GB")
    parser.add_argument("--memory", default="3GiB", help="budget of the second run")
    parser.add_argument("--only", choices=("free", "budget"), help="one of the two runs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker, arguments.memory)
        return
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="reap-glm46-"))
    source = directory / "source"
    if not (source / "config.json").exists():
        make_checkpoint(source)
    runs = {"free": None, "budget": arguments.memory}
    results = {
        name: run_worker(directory, memory)
        for name, memory in runs.items()
        if arguments.only in (None, name)
    }
    report(results, source, as_json=arguments.json)
    if arguments.directory is None:
        shutil.rmtree(directory)


def tensors() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Every tensor of the checkpoint: name, dtype tag, shape."""
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS + 1):
        prefix = f"model.layers.{layer}."
        yield from _attention(prefix)
        if layer == 0:
            yield from _mlp(prefix + "mlp.", DENSE_WIDTH)
        else:
            yield prefix + "mlp.gate.weight", "BF16", (EXPERTS, HIDDEN)
            yield prefix + "mlp.gate.e_score_correction_bias", "F32", (EXPERTS,)
            yield from _mlp(prefix + "mlp.shared_experts.", WIDTH)
            for expert in range(EXPERTS):
                yield from _mlp(f"{prefix}mlp.experts.{expert}.", WIDTH)
        if layer == LAYERS:
            yield prefix + "eh_proj.weight", "BF16", (HIDDEN, 2 * HIDDEN)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{prefix}{norm}.weight", "BF16", (HIDDEN,)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCABULARY, HIDDEN)


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield name + ".weight", "F8_E4M3", (rows, columns)
    yield name + ".weight_scale", "F32", (rows, 1)


def _attention(prefix: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield prefix + "input_layernorm.weight", "BF16", (HIDDEN,)
    yield prefix + "post_attention_layernorm.weight", "BF16", (HIDDEN,)
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        yield from _linear(f"{prefix}self_attn.{name}_proj", heads * HEAD_DIM, HIDDEN)
        yield f"{prefix}self_attn.{name}_proj.bias", "BF16", (heads * HEAD_DIM,)
    yield from _linear(f"{prefix}self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM)
    for name in ("q_norm", "k_norm"):
        yield f"{prefix}self_attn.{name}.weight", "BF16", (HEAD_DIM,)


def _mlp(prefix: str, width: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield from _linear(prefix + "gate_proj", width, HIDDEN)
    yield from _linear(prefix + "up_proj", width, HIDDEN)
    yield from _linear(prefix + "down_proj", HIDDEN, width)


def make_checkpoint(directory: Path) -> None:
    """Writes the checkpoint shard by shard from a pool of random codes; needs little memory."""
    import torch

    from reap_stream.checkpoint.header import render_header
    from reap_stream.checkpoint.dtypes import tensor_nbytes

    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(POOL_NBYTES // 8, generator=generator) * 64
    codes = values.to(torch.float8_e4m3fn).view(torch.uint8).repeat(8).numpy()
    rng = np.random.default_rng(0)
    shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    filled = 0
    for name, dtype, shape in tensors():
        nbytes = tensor_nbytes(dtype, shape)
        if filled + nbytes > SHARD_NBYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape, nbytes))
        filled += nbytes
    weight_map = {}
    for number, entries in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys((entry[0] for entry in entries), file))
        rows, end = [], 0
        for name, dtype, shape, nbytes in entries:
            rows.append((name, dtype, shape, end, end + nbytes))
            end += nbytes
        with (directory / file).open("wb") as out:
            out.write(render_header(rows, {"format": "pt"}))
            for name, dtype, shape, nbytes in entries:
                out.write(_bytes(name, dtype, shape, nbytes, codes, rng))
    total = sum(entry[3] for entries in shards for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))


def _bytes(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    nbytes: int,
    codes: np.ndarray[Any, Any],
    rng: np.random.Generator,
) -> Any:
    if dtype == "F8_E4M3":
        start = int(rng.integers(0, len(codes) - nbytes))
        return memoryview(codes[start : start + nbytes])
    if dtype == "F32":
        scale = 0.02 if "correction_bias" in name else 0.02 / 64
        return (rng.random(shape, dtype=np.float32) * scale + scale / 2).tobytes()
    if "norm" in name:
        values = np.ones(shape, dtype=np.float32)
    else:
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def run_worker(directory: Path, memory: str | None) -> dict[str, Any]:
    """Prunes in a process of its own, whose peak memory is then the run's alone."""
    shutil.rmtree(directory / "pruned", ignore_errors=True)
    command = [sys.executable, __file__, "--worker", str(directory), "--memory", memory or ""]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


class Products:
    """Times and counts matrix products by wrapping torch's linear function."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, int, int], float] = defaultdict(float)
        self.calls: dict[tuple[int, int, int], int] = defaultdict(int)

    def wrap(self, linear: Any) -> Any:
        """The function with a clock."""

        def timed(rows: Any, weight: Any, bias: Any = None) -> Any:
            started = time.perf_counter()
            result = linear(rows, weight, bias)
            count = rows.numel() // rows.shape[-1]
            shape = (count, weight.shape[0], weight.shape[1])
            self.seconds[shape] += time.perf_counter() - started
            self.calls[shape] += 1
            return result

        return timed

    def flops(self) -> float:
        """Floating-point operations of all products."""
        return sum(2.0 * m * n * k * calls for (m, n, k), calls in self.calls.items())


def work(directory: Path, memory: str) -> None:
    """The measured run; prints one line of JSON."""
    import torch

    from reap_stream.pipeline import prune
    from reap_stream.settings import OutputSettings, RunSettings, parse_nbytes

    rows = np.random.default_rng(1).integers(0, VOCABULARY, size=(ROWS, ROW_TOKENS))
    np.save(directory / "tokens.npy", rows)
    products = Products()
    bare = torch.nn.functional.linear
    torch.nn.functional.linear = products.wrap(bare)
    run = RunSettings(
        model=directory / "source",
        calibration=(str(directory / "tokens.npy"),),
        memory=parse_nbytes(memory) if memory else None,
        compute_dtype="bfloat16",
    )
    summary = prune(run, OutputSettings(output=directory / "pruned", sparsity="0.4"))
    torch.nn.functional.linear = bare
    seconds = sum(products.seconds.values())
    result = {
        "seconds": summary.seconds,
        "peak_nbytes": summary.peak_nbytes,
        "read_nbytes": summary.read_nbytes,
        "written_nbytes": summary.written_nbytes,
        "memory": summary.details["memory"],
        "batch_tokens": summary.details["settings"]["batch_tokens"],
        "stages": summary.details.get("stages", {}),
        "product_seconds": seconds,
        "product_rate": products.flops() / seconds,
        "bare_rate": bare_rate(products, bare),
    }
    print(json.dumps(result))


def bare_rate(products: Products, linear: Any) -> float:
    """FLOP/s of the same products alone: random operands, weights that are not in any cache."""
    import torch

    shapes = sorted(products.calls, key=lambda s: -products.seconds[s])[:24]
    weights: dict[tuple[int, int], list[Any]] = {}
    flops = seconds = 0.0
    with torch.inference_mode():
        for m, n, k in shapes:
            pool = weights.setdefault((n, k), [])
            while len(pool) < max(2, min(8, 10**9 // (2 * n * k))):
                pool.append(torch.randn(n, k, dtype=torch.float32).to(torch.bfloat16))
            rows = torch.randn(m, k).to(torch.bfloat16)
            linear(rows, pool[0])
            started = time.perf_counter()
            for weight in pool:
                linear(rows, weight)
            each = (time.perf_counter() - started) / len(pool)
            calls = products.calls[m, n, k]
            seconds += each * calls
            flops += 2.0 * m * n * k * calls
    return flops / seconds


def report(results: dict[str, dict[str, Any]], source: Path, *, as_json: bool) -> None:
    """Prints what was measured."""
    nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    layer = sum(
        int(np.prod(shape)) * {"F8_E4M3": 1, "F32": 4, "BF16": 2}[dtype]
        for name, dtype, shape in tensors()
        if name.startswith("model.layers.1.")
    )
    hidden = ROWS * ROW_TOKENS * HIDDEN * 2
    tokens = ROWS * ROW_TOKENS * LAYERS
    for result in results.values():
        result["read_ratio"] = result["read_nbytes"] / nbytes
        result["tokens_per_second"] = tokens / result["seconds"]
        result["product_share"] = result["product_seconds"] / result["seconds"]
        result["product_rate_ratio"] = result["product_rate"] / result["bare_rate"]
        result["peak_over_layer_and_hidden"] = result["peak_nbytes"] - layer - hidden
    if as_json:
        print(json.dumps({"checkpoint_nbytes": nbytes, "layer_nbytes": layer, **results}))
        return
    print(f"checkpoint {nbytes / 1e9:.2f} GB, one MoE layer {layer / 2**30:.2f} GiB")
    for name, r in results.items():
        print(
            f"{name}: {r['seconds']:.1f} s, {r['tokens_per_second']:.0f} tokens/s through a layer, "
            f"peak {r['peak_nbytes'] / 2**30:.2f} GiB (layer + hidden states + "
            f"{r['peak_over_layer_and_hidden'] / 2**30:.2f} GiB), "
            f"bytes read / checkpoint {r['read_ratio']:.3f}, share of time in products "
            f"{r['product_share']:.2f}, product rate / bare rate {r['product_rate_ratio']:.2f} "
            f"({r['product_rate'] / 1e9:.0f} / {r['bare_rate'] / 1e9:.0f} GFLOP/s), batches of "
            f"{r['batch_tokens']} tokens, {r['memory']['expert_slots']} experts held"
        )


if __name__ == "__main__":
    main()
