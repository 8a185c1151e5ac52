"""What the extension refuses, and what it says about itself."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest

from reap_stream import _native

CODES = np.zeros((4, 6), np.uint8)
SCALE = np.ones((2, 2), np.float32)
OUT = np.zeros((4, 6), np.uint16)
F32 = np.zeros((4, 6), np.float32)
SHAPE = {"rows": 4, "cols": 6, "block_rows": 2, "block_cols": 3}
READ_ONLY = np.zeros((4, 6), np.uint16)
READ_ONLY.setflags(write=False)
SHARED = np.zeros(72, np.uint8)

DECODE = {"src": CODES, "scale": SCALE, "out": OUT, **SHAPE, "out_dtype": "bf16"}
ENCODE = {"src": F32, "src_dtype": "f32", "scale": SCALE, "out": np.zeros(24, np.uint8), **SHAPE}
ABSMAX = {"src": F32, "src_dtype": "f32", "out": np.zeros((2, 2), np.float32), **SHAPE}
SUM_NAMES = ("gate_sum", "norm_sum", "gate_norm_sum", "norm_max", "output_max")
SUMS = {name: np.zeros(3) for name in SUM_NAMES}
SALIENCY = {
    "rows": F32,
    "dtype": "f32",
    "gates": np.ones(4, np.float32),
    "sources": np.zeros(4, np.int32),
    "tokens": np.zeros(3, np.int64),
    **SUMS,
    "dim": 6,
}
COMBINE = {
    "rows": F32,
    "dtype": "f32",
    "gates": np.ones(4, np.float32),
    "tokens": np.zeros(4, np.int64),
    "out": np.zeros((5, 6), np.float32),
    "dim": 6,
}
READ = {"files": [], "ranges": [], "outs": []}
WRITE = {"files": ["f"], "ranges": [(0, 0, 1)], "srcs": [b"x"]}
COPY = {"src_files": ["f"], "dst_files": ["g"], "ranges": []}

DEFAULTS = {
    "fp8_decode": DECODE,
    "fp8_encode": ENCODE,
    "block_absmax": ABSMAX,
    "saliency": SALIENCY,
    "combine": COMBINE,
    "read_ranges": READ,
    "write_ranges": WRITE,
    "copy_ranges": COPY,
    "prefetch": {"path": "f", "offset": 0, "nbytes": 1},
    "preallocate": {"path": "f", "nbytes": 1},
}

# function, what is changed in a call that is right, error, message
REFUSED = [
    ("fp8_decode", {"src": CODES[:3]}, ValueError, "src has 18 bytes where the shape needs 24"),
    ("fp8_decode", {"out": OUT[:3]}, ValueError, "out has 36 bytes where the shape needs 48"),
    ("fp8_decode", {"out_dtype": "f32"}, ValueError, "out has 48 bytes where the shape needs 96"),
    ("fp8_decode", {"scale": SCALE[:1]}, ValueError, "scale has 2 items where 4 are needed"),
    ("fp8_decode", {"scale": SCALE.astype(float)}, ValueError, "items of 8 bytes .* 32-bit floats"),
    (
        "fp8_decode",
        {"scale": np.ones((2, 2), np.int32)},
        ValueError,
        "format 'i' where 32-bit floats",
    ),
    ("fp8_decode", {"src": CODES[:, ::-1]}, ValueError, "src must be C-contiguous"),
    ("fp8_decode", {"src": np.asfortranarray(CODES)}, ValueError, "src must be C-contiguous"),
    ("fp8_decode", {"out": READ_ONLY}, ValueError, "out must be C-contiguous and writable"),
    ("fp8_decode", {"out": bytes(48)}, ValueError, "out must be C-contiguous and writable"),
    ("fp8_decode", {"src": [0] * 24}, TypeError, "src must have the buffer protocol .* not list"),
    ("fp8_decode", {"scale": 1.0}, TypeError, "scale must have the buffer protocol .* not float"),
    ("fp8_decode", {"src": SHARED[:24], "out": SHARED[20:68]}, ValueError, "overlap in memory"),
    (
        "fp8_decode",
        {"out_dtype": "f16"},
        ValueError,
        "out_dtype is 'f16'; it can be one of bf16, f32",
    ),
    ("fp8_decode", {"rows": -4}, ValueError, "rows is -4; it must be from 0"),
    ("fp8_decode", {"rows": 2**70}, ValueError, f"rows is {2**70}"),
    ("fp8_decode", {"rows": 2**40, "cols": 2**40}, ValueError, "more than 2\\^63 - 1"),
    ("fp8_decode", {"rows": 2**62, "cols": 1}, ValueError, "more than 2\\^63 - 1"),
    ("fp8_decode", {"rows": 4.0}, TypeError, "rows must be an integer, not float"),
    ("fp8_decode", {"block_rows": 0}, ValueError, "block_rows is 0; it must be at least 1"),
    ("fp8_decode", {"block_cols": -1}, ValueError, "block_cols is -1"),
    ("fp8_decode", {"threads": -1}, ValueError, "threads is -1"),
    ("fp8_decode", {"threads": 10**6}, ValueError, "threads is 1000000; at most 1024"),
    ("fp8_decode", {"isa": "sse9"}, ValueError, "isa is 'sse9'"),
    ("fp8_encode", {"src": F32[:3]}, ValueError, "src has 72 bytes where the shape needs 96"),
    ("fp8_encode", {"out": bytearray(23)}, ValueError, "out has 23 bytes where the shape needs 24"),
    ("fp8_encode", {"src_dtype": "f16"}, ValueError, "src_dtype is 'f16'"),
    ("fp8_encode", {"scale": SCALE * 0}, ValueError, "finite and above zero"),
    ("block_absmax", {"out": np.zeros(3, np.float32)}, ValueError, "out has 3 items where 4"),
    ("block_absmax", {"out": bytearray(16)}, ValueError, "format 'B' where 32-bit floats"),
    ("saliency", {"rows": F32[:3]}, ValueError, "rows has 72 bytes where the shape needs 96"),
    ("saliency", {"dim": 5}, ValueError, "rows has 96 bytes where the shape needs 80"),
    ("saliency", {"dim": 0}, ValueError, "dim is 0"),
    ("saliency", {"dtype": "f64"}, ValueError, "dtype is 'f64'; it can be one of bf16, f16, f32"),
    ("saliency", {"sources": np.zeros(3, np.int32)}, ValueError, "sources has 3 items where 4"),
    (
        "saliency",
        {"sources": np.zeros(4, np.int64)},
        ValueError,
        "items of 8 bytes .* 32-bit integers",
    ),
    ("saliency", {"tokens": np.zeros(3)}, ValueError, "format 'd' where 64-bit integers"),
    ("saliency", {"norm_sum": np.zeros(2)}, ValueError, "norm_sum has 2 items where 3"),
    ("saliency", {"norm_max": SUMS["norm_sum"]}, ValueError, "overlap in memory"),
    ("saliency", {"output_max": SUMS["norm_max"]}, ValueError, "overlap in memory"),
    ("saliency", {"output_max": np.zeros(2)}, ValueError, "output_max has 2 items where 3"),
    ("saliency", {"gates": np.ones(4)}, ValueError, "gates has items of 8 bytes"),
    (
        "combine",
        {"out": np.zeros(29, np.float32)},
        ValueError,
        "out has 29 items, not a multiple of dim",
    ),
    ("combine", {"tokens": np.zeros(4, np.int32)}, ValueError, "64-bit integers"),
    ("combine", {"tokens": np.full(4, 5)}, ValueError, r"tokens\[0\] is 5; out has 5 rows"),
    ("read_ranges", {"files": "name"}, TypeError, "a list of paths, not one path"),
    ("read_ranges", {"files": [3]}, TypeError, "int"),
    ("read_ranges", {"files": ["a\0b"]}, ValueError, "null byte"),
    ("write_ranges", {"ranges": [(0, 0)]}, ValueError, r"ranges\[0\] has 2 numbers where 3"),
    ("write_ranges", {"ranges": [(1, 0, 1)]}, ValueError, r"ranges\[0\] names file 1; there are 1"),
    ("write_ranges", {"ranges": [(0, -1, 1)]}, ValueError, r"ranges\[0\]\[1\] is -1"),
    ("write_ranges", {"ranges": [(0, 2**63, 1)]}, ValueError, rf"ranges\[0\]\[1\] is {2**63}"),
    ("write_ranges", {"ranges": [(0, 2**63 - 1, 1)]}, ValueError, "plus 1 bytes is more than 2"),
    ("write_ranges", {"ranges": [(0, 0, 2)]}, ValueError, r"has 2 bytes, srcs\[0\] has 1"),
    ("write_ranges", {"ranges": [(0, 0, 1.0)]}, TypeError, "must be an integer, not float"),
    ("write_ranges", {"ranges": [7]}, TypeError, "int"),
    ("write_ranges", {"srcs": []}, ValueError, "there are 1 ranges and 0 srcs"),
    ("write_ranges", {"srcs": [b"x", b"y"]}, ValueError, "there are 1 ranges and 2 srcs"),
    (
        "copy_ranges",
        {"ranges": [(0, 0, 1, 0, 1)]},
        ValueError,
        r"\(target\) names file 1; there are 1",
    ),
    ("copy_ranges", {"ranges": [(0, 2**63 - 1, 0, 0, 9)]}, ValueError, r"\(source\): offset"),
    ("prefetch", {"offset": -1}, ValueError, "offset is -1"),
    ("prefetch", {"offset": 2**62, "nbytes": 2**62}, ValueError, "more than 2"),
    ("preallocate", {"nbytes": -1}, ValueError, "nbytes is -1"),
    ("preallocate", {"nbytes": 2**63}, ValueError, f"nbytes is {2**63}"),
]


@pytest.mark.parametrize(
    ("function", "changed", "error", "message"),
    REFUSED,
    ids=[f"{i}-{row[0]}-{'-'.join(row[1])}" for i, row in enumerate(REFUSED)],
)
def test_wrong_arguments_are_refused(function, changed, error, message):
    with pytest.raises(error, match=message):
        getattr(_native, function)(**DEFAULTS[function] | changed)


@pytest.mark.parametrize(
    "function", ["fp8_decode", "fp8_encode", "block_absmax", "saliency", "combine", "read_ranges"]
)
def test_the_calls_that_the_refused_ones_differ_from_are_right(function):
    getattr(_native, function)(**DEFAULTS[function])


def test_an_array_that_is_not_aligned_is_refused():
    raw = np.zeros(17, np.uint8)
    scale = raw[1:].view(np.float32)
    with pytest.raises(ValueError, match="multiple of its item's 4 bytes"):
        _native.fp8_decode(**DECODE | {"scale": scale})


def test_a_buffer_is_held_only_while_it_is_used():
    out = bytearray(48)
    _native.fp8_decode(**DECODE | {"out": out})
    with pytest.raises(ValueError, match="src has"):
        _native.fp8_decode(**DECODE | {"out": out, "src": b""})
    out.append(0)  # BufferError while a view of it is held


def test_version_is_the_distributions():
    assert _native.version() == metadata.version("reap-stream")


def test_isas_are_ordered_and_the_last_is_active():
    isas = _native.available_isas()
    assert isas == ["scalar", "avx2", "avx512"][: len(isas)]
    assert _native.active_isa() == isas[-1]


def run_with_cap(cap):
    program = "from reap_stream import _native; print(*_native.available_isas())"
    environment = os.environ | {"REAP_STREAM_MAX_ISA": cap}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("cap", ["scalar", "avx2", "avx512", ""])
def test_the_environment_lowers_the_instruction_set_and_never_raises_it(cap):
    best = _native.available_isas()
    expected = best[: best.index(cap) + 1] if cap in best else best
    assert run_with_cap(cap).stdout.split() == expected


def test_an_instruction_set_that_does_not_exist_is_refused():
    done = run_with_cap("neon")
    assert done.returncode != 0
    assert "REAP_STREAM_MAX_ISA is 'neon'" in done.stderr
