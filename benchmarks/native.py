"""The extension against torch, memory and `cp`, side by side in one run.

Each claim is a ratio of two medians, the two sides measured in turns, so that a busy machine
slows both. `python benchmarks/native.py [--json]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from reap_stream import _native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROWS, COLS = 3072, 5120  # an expert's down projection, transposed: GLM-4.6's width
BLOCK = 128
NUM_ROUTED = 4096  # rows of one expert's output, in a large batch
NUM_ROUTED_SMALL = 512  # what fits the cache, where torch's temporaries cost it least
NUM_TOKENS = 8192
COPY_NBYTES = 512 << 20


@dataclass(frozen=True)
class Result:
    """Seconds of both sides (medians), and the bytes each of them reads and writes."""

    name: str
    ours_s: float
    other_s: float
    ours_nbytes: int
    other_nbytes: int
    aim: float

    @property
    def ratio(self) -> float:
        """Bytes a second of ours over bytes a second of the other's."""
        return (self.ours_nbytes / self.ours_s) / (self.other_nbytes / self.other_s)

    def line(self) -> str:
        """Return the result as one line of the table."""
        return (
            f"{self.name:42} {self.ours_s * 1e3:9.2f} ms {self.ours_nbytes / self.ours_s / 1e9:7.2f} GB/s"
            f" | {self.other_s * 1e3:9.2f} ms | ratio {self.ratio:7.2f}  (aim {self.aim:g})"
        )


def medians(
    ours: Callable[[], object], other: Callable[[], object], repeats: int
) -> tuple[float, float]:
    """Run both in turns, after one warm-up each; return the median seconds of each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for run in range(repeats + 1):
        for side, call in enumerate((ours, other)):
            start = time.perf_counter()
            call()
            if run > 0:
                seconds[side].append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def compare(
    name: str,
    ours: Callable[[], object],
    other: Callable[[], object],
    nbytes: tuple[int, int],
    aim: float,
    repeats: int,
) -> Result:
    """Measure one claim; `nbytes` are what each side reads and writes."""
    ours_s, other_s = medians(ours, other, repeats)
    return Result(name, ours_s, other_s, *nbytes, aim)


def decode(block: tuple[int, int], label: str, repeats: int) -> Iterator[Result]:
    """FP8 to bf16: against torch's cast and multiplication, and against a memory copy."""
    codes = torch.randint(0, 256, (ROWS, COLS), dtype=torch.uint8)
    grid = (-(-ROWS // block[0]), -(-COLS // block[1]))
    scale = torch.rand(grid) + 0.5
    out = np.empty((ROWS, COLS), np.uint16)

    def ours() -> None:
        _native.fp8_decode(codes.numpy(), scale.numpy(), out, ROWS, COLS, *block, "bf16")

    def by_torch() -> torch.Tensor:
        wide = codes.view(torch.float8_e4m3fn).to(torch.float32)
        blocks = wide.view(grid[0], block[0], grid[1], block[1])
        return (blocks * scale[:, None, :, None]).view(ROWS, COLS).to(torch.bfloat16)

    moved = 3 * ROWS * COLS
    src = np.ones(moved // 2, np.uint8)
    dst = np.ones(moved // 2, np.uint8)
    ours()
    expected = by_torch().view(torch.int16).numpy()
    if not np.array_equal(out.view(np.int16), expected):
        sys.exit("fp8_decode and torch differ")
    yield compare(f"decode {label} / torch", ours, by_torch, (moved, moved), 10, repeats)
    yield compare(
        f"decode {label} / memory copy",
        ours,
        lambda: np.copyto(dst, src),
        (moved, moved),
        0.5,
        3 * repeats,
    )


def decode_packed(code: str, group: int, label: str, repeats: int) -> Iterator[Result]:
    """4-bit and 8-bit codes with a scale a group to bf16, against a memory copy."""
    rng = np.random.default_rng(0)
    row_nbytes = COLS if code == "u8" else COLS // 2
    codes = rng.integers(0, 256, (ROWS, row_nbytes), dtype=np.uint8)
    byte_scales = code == "e2m1"
    scale = rng.integers(
        100, 140, (ROWS, COLS // group), dtype=np.uint8 if byte_scales else np.uint16
    )
    table = np.exp2(np.arange(256) - 160.0).astype(np.float32) if byte_scales else None
    out = np.empty((ROWS, COLS), np.uint16)
    shape = (ROWS, COLS, group, row_nbytes)

    def ours() -> None:
        tag = "u8" if byte_scales else "bf16"
        _native.packed_decode(codes, code, scale, tag, table, None, out, *shape, "bf16")

    moved = codes.nbytes + scale.nbytes + out.nbytes
    src, dst = np.ones(moved // 2, np.uint8), np.ones(moved // 2, np.uint8)
    yield compare(
        f"decode {label} / memory copy",
        ours,
        lambda: np.copyto(dst, src),
        (moved, moved),
        0.3,
        3 * repeats,
    )


def decode_groups(repeats: int) -> Iterator[Result]:
    """MXFP8, a scale for each 32 columns, against a memory copy."""
    codes = np.random.default_rng(0).integers(0, 256, (ROWS, COLS), dtype=np.uint8)
    scale = np.ones((ROWS, COLS // 32), np.float32)
    out = np.empty((ROWS, COLS), np.uint16)
    moved = codes.nbytes + scale.nbytes + out.nbytes
    src, dst = np.ones(moved // 2, np.uint8), np.ones(moved // 2, np.uint8)
    yield compare(
        "decode MXFP8 / memory copy",
        lambda: _native.fp8_decode(codes, scale, out, ROWS, COLS, 1, 32, "bf16"),
        lambda: np.copyto(dst, src),
        (moved, moved),
        0.3,
        3 * repeats,
    )


def decode_rearranged(layout: str, bits: int, group: int, repeats: int) -> Iterator[Result]:
    """GPTQ, AWQ and INT8 to bf16, against a memory copy."""
    rng = np.random.default_rng(0)
    groups = COLS // group
    codes = rng.integers(0, 256, ROWS * COLS * bits // 8, dtype=np.uint8)
    scale = np.full(groups * ROWS, 0x2000, np.uint16)  # a small number of float16
    zero = rng.integers(0, 256, groups * ROWS * bits // 8, dtype=np.uint8)
    out = np.empty((ROWS, COLS), np.uint16)
    tensors = (codes, layout, bits, scale, "f16", None if layout == "int8" else zero, 0, None)
    moved = codes.nbytes + scale.nbytes + zero.nbytes + out.nbytes
    src, dst = np.ones(moved // 2, np.uint8), np.ones(moved // 2, np.uint8)
    yield compare(
        f"decode {layout}, {bits} bits, groups of {group} / memory copy",
        lambda: _native.rearranged_decode(*tensors, out, ROWS, COLS, group, "bf16"),
        lambda: np.copyto(dst, src),
        (moved, moved),
        0.3,
        3 * repeats,
    )


def encode(repeats: int) -> Iterator[Result]:
    """bf16 to FP8 with 128x128 blocks, and the blocks' largest values, against torch."""
    values = torch.randn(ROWS, COLS).to(torch.bfloat16)
    raw = values.view(torch.int16).numpy()
    grid = (ROWS // BLOCK, COLS // BLOCK)
    scale = torch.rand(grid) + 0.5
    out = np.empty((ROWS, COLS), np.uint8)
    largest = np.empty(grid, np.float32)
    blocks = values.view(grid[0], BLOCK, grid[1], BLOCK)

    def by_torch() -> torch.Tensor:
        scaled = blocks.float() / scale[:, None, :, None]
        return scaled.clamp(-448, 448).to(torch.float8_e4m3fn)

    moved = 3 * ROWS * COLS
    yield compare(
        "encode bf16, block scales / torch",
        lambda: _native.fp8_encode(raw, "bf16", scale.numpy(), out, ROWS, COLS, BLOCK, BLOCK),
        by_torch,
        (moved, moved),
        10,
        repeats,
    )
    yield compare(
        "block_absmax bf16 / torch",
        lambda: _native.block_absmax(raw, "bf16", largest, ROWS, COLS, BLOCK, BLOCK),
        lambda: blocks.abs().amax(dim=(1, 3)).float(),
        (moved, moved),
        1,
        repeats,
    )


def saliency(num_rows: int, dtype: str, aim: float, repeats: int) -> Iterator[Result]:
    """Norms times gates of one expert's rows, summed in float64, against torch."""
    gates = torch.rand(num_rows)
    sources = np.zeros(num_rows, np.int32)
    tokens = np.zeros(1, np.int64)
    sums = [np.zeros(1) for _ in range(5)]
    rows = torch.randn(num_rows, COLS).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    raw = rows.view(torch.int16 if dtype == "bf16" else torch.int32).numpy()
    yield compare(
        f"saliency {dtype}, {num_rows} rows / torch",
        lambda: _native.saliency(raw, dtype, gates.numpy(), sources, tokens, *sums, COLS),
        lambda: (rows.float().norm(dim=-1) * gates).double().sum(),
        (raw.nbytes, raw.nbytes),
        aim,
        repeats,
    )


def combine(repeats: int) -> Iterator[Result]:
    """Weighted rows added to their tokens, against index_add_."""
    rows = torch.randn(NUM_ROUTED, COLS).to(torch.bfloat16)
    raw = rows.view(torch.int16).numpy()
    gates = torch.rand(NUM_ROUTED)
    tokens = torch.randperm(NUM_TOKENS)[:NUM_ROUTED].sort().values
    out = torch.zeros(NUM_TOKENS, COLS)
    moved = NUM_ROUTED * COLS * (2 + 4 + 4)
    yield compare(
        "combine bf16 / torch index_add_",
        lambda: _native.combine(raw, "bf16", gates.numpy(), tokens.numpy(), out.numpy(), COLS),
        lambda: out.index_add_(0, tokens, rows.float() * gates[:, None]),
        (moved, moved),
        1,
        repeats,
    )


def copy(directory: Path, repeats: int) -> Iterator[Result]:
    """One file into another, page cache warm, against `cp` of the same file."""
    source, ours_path, cp_path = (str(directory / name) for name in ("source", "ours", "cp"))
    Path(source).write_bytes(np.random.default_rng(0).bytes(COPY_NBYTES))

    def ours() -> None:
        Path(ours_path).unlink(missing_ok=True)
        _native.preallocate(ours_path, COPY_NBYTES)
        _native.copy_ranges([source], [ours_path], [(0, 0, 0, 0, COPY_NBYTES)])

    def by_cp() -> None:
        Path(cp_path).unlink(missing_ok=True)
        subprocess.run(["cp", source, cp_path], check=True)

    moved = 2 * COPY_NBYTES
    yield compare("copy_ranges with preallocate / cp", ours, by_cp, (moved, moved), 0.9, repeats)


def main() -> None:
    """Run every comparison and print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--repeats", type=int, default=7, help="default: 7")
    arguments = parser.parse_args()
    repeats = arguments.repeats
    with tempfile.TemporaryDirectory() as directory:
        results = [
            *decode((1, COLS), "channel scales", repeats),
            *decode((BLOCK, BLOCK), "128x128 scales", repeats),
            *decode_packed("e2m1", 32, "MXFP4", repeats),
            *decode_packed("e2m1", 16, "NVFP4", repeats),
            *decode_packed("u4", 32, "INT4, groups of 32", repeats),
            *decode_packed("u4", 128, "INT4, groups of 128", repeats),
            *decode_packed("u8", COLS, "INT8 by channel", repeats),
            *decode_groups(repeats),
            *decode_rearranged("gptq", 4, 128, repeats),
            *decode_rearranged("gptq", 8, 128, repeats),
            *decode_rearranged("awq", 4, 128, repeats),
            *decode_rearranged("int8", 8, COLS, repeats),
            *encode(repeats),
            *saliency(NUM_ROUTED, "bf16", 5, repeats),
            *saliency(NUM_ROUTED, "f32", 1, repeats),
            *saliency(NUM_ROUTED_SMALL, "bf16", 1, repeats),
            *combine(repeats),
            *copy(Path(directory), repeats),
        ]
    if arguments.json:
        print(
            json.dumps([asdict(result) | {"ratio": result.ratio} for result in results], indent=1)
        )
        return
    print(
        f"isa {_native.active_isa()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    for result in results:
        print(result.line())


if __name__ == "__main__":
    main()
