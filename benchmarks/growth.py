"""How cost grows: twice the layers, twice the tokens.

    python benchmarks/growth.py [--directory D]

Prunes half the experts of three runs on one kind of checkpoint (hidden 1024, 64 experts of width
512, FP8): L layers with T tokens, 2L layers with T tokens, L layers with 2T tokens; each in a
process of its own. Seconds are those of the pass, without the start of Python.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import Widths, make_checkpoint

BASE = {
    "vocabulary": 8192,
    "hidden": 1024,
    "experts": 64,
    "expert_width": 512,
    "dense_width": 3072,
    "heads": 16,
    "kv_heads": 4,
    "head_dim": 64,
}
LAYERS, ROWS, ROW_TOKENS = 9, 32, 512


def main() -> None:
    """Makes two checkpoints, prunes three times, prints ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="reap-growth-"))
    # The first layer is dense, so that 2 × (LAYERS - 1) MoE layers are twice as many.
    for layers in (LAYERS, 2 * LAYERS - 1):
        if not (directory / str(layers) / "config.json").exists():
            make_checkpoint(directory / str(layers), Widths(layers=layers, **BASE))
    results = {
        "base": run(directory, LAYERS, ROWS),
        "layers × 2": run(directory, 2 * LAYERS - 1, ROWS),
        "tokens × 2": run(directory, LAYERS, 2 * ROWS),
    }
    base = results["base"]
    for result in results.values():
        result["time_ratio"] = result["seconds"] / base["seconds"]
        result["memory_ratio"] = result["peak_nbytes"] / base["peak_nbytes"]
    if arguments.json:
        print(json.dumps(results))
    else:
        for name, r in results.items():
            print(
                f"{name}: {r['seconds']:.2f} s ({r['time_ratio']:.2f} ×), peak "
                f"{r['peak_nbytes'] / 1e6:.0f} MB ({r['memory_ratio']:.2f} ×)"
            )
    if arguments.directory is None:
        shutil.rmtree(directory)


def run(directory: Path, layers: int, rows: int) -> dict[str, Any]:
    """One pruning: seconds of its pass and peak memory of its process."""
    tokens, out = directory / "tokens.npy", directory / "out"
    np.save(tokens, np.random.default_rng(0).integers(0, 8192, size=(rows, ROW_TOKENS)))
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "reap_stream", "prune", str(directory / str(layers))]
    command += ["--sparsity", "0.5", "--output", str(out), "--calibration", str(tokens)]
    command += ["--batch-tokens", "4096", "--compute-dtype", "bfloat16"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)} failed with status {status}")
    stages = json.loads((out / "reap" / "run.json").read_text())["stages"]
    return {"seconds": sum(stages.values()), "peak_nbytes": usage.ru_maxrss * 1024}


if __name__ == "__main__":
    main()
