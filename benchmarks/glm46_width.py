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
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import Widths, make_checkpoint

WIDTHS = Widths()
ROWS, ROW_TOKENS = 16, 512


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
        make_checkpoint(source, WIDTHS)
    runs = {"free": None, "budget": arguments.memory}
    results = {
        name: run_worker(directory, memory)
        for name, memory in runs.items()
        if arguments.only in (None, name)
    }
    report(results, source, as_json=arguments.json)
    if arguments.directory is None:
        shutil.rmtree(directory)


def run_worker(directory: Path, memory: str | None) -> dict[str, Any]:
    """Prunes in a process of its own, whose peak memory is then the run's alone."""
    shutil.rmtree(directory / "pruned", ignore_errors=True)
    command = [sys.executable, __file__, "--worker", str(directory), "--memory", memory or ""]
    # Waiting threads sleep, as under the command line.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
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

    rows = np.random.default_rng(1).integers(0, WIDTHS.vocabulary, size=(ROWS, ROW_TOKENS))
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
    layer = WIDTHS.layer_nbytes(1)
    hidden = ROWS * ROW_TOKENS * WIDTHS.hidden * 2
    tokens = ROWS * ROW_TOKENS * WIDTHS.layers
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
            f"{r['batch_tokens']} tokens, {r['memory']['expert_slots']} experts held; seconds: "
            + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in r["stages"].items())
        )


if __name__ == "__main__":
    main()
