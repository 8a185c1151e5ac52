# ruff: noqa: PYI021 -- a compiled module has no other place where its documentation is read.
"""Kernels and file transfers of the C++ extension, on plain buffers.

Buffers are C-contiguous objects with the buffer protocol (a numpy array, a bytearray, a
memoryview of one); a torch tensor is passed as `tensor.numpy()`, bfloat16 and float8 ones viewed
as integers first. Bulk data may have any item type so long as its bytes are as many as its shape
needs; scales, gates, indices and sums must have the item type that is named.

Every function releases the GIL while it works. All raise `ValueError` for a buffer of the wrong
length, layout or item type, a number that is negative or too large, or buffers that overlap, and
`TypeError` for an argument that is no buffer, number or path at all.

`threads=0` is as many threads as the process may run on; small work stays on the caller's. `isa`
is "auto", or one of `available_isas()`. Neither changes a bit of any result.
"""

from collections.abc import Iterable
from os import PathLike
from typing import Literal, SupportsIndex, TypeAlias

from typing_extensions import Buffer

_Path: TypeAlias = str | bytes | PathLike[str] | PathLike[bytes]
_Isa: TypeAlias = Literal["auto", "scalar", "avx2", "avx512"]
_Float: TypeAlias = Literal["bf16", "f32"]
_RowFloat: TypeAlias = Literal["bf16", "f16", "f32"]
_Range: TypeAlias = tuple[SupportsIndex, SupportsIndex, SupportsIndex]
_CopyRange: TypeAlias = tuple[
    SupportsIndex, SupportsIndex, SupportsIndex, SupportsIndex, SupportsIndex
]

def version() -> str:
    """Return the version of the package that this extension was built for."""

def available_isas() -> list[str]:
    """Return the instruction sets that can run here, the plainest first.

    The environment variable REAP_STREAM_MAX_ISA (scalar, avx2 or avx512), read once, can lower
    the best of them and never raises it.
    """

def active_isa() -> str:
    """Return the instruction set that `isa="auto"` stands for: the last of `available_isas()`."""

def fp8_decode(
    src: Buffer,
    scale: Buffer | None,
    out: Buffer,
    rows: SupportsIndex,
    cols: SupportsIndex,
    block_rows: SupportsIndex,
    block_cols: SupportsIndex,
    out_dtype: _Float,
    threads: SupportsIndex = 0,
    isa: _Isa = "auto",
) -> None:
    """Decode an FP8 (E4M3FN) matrix: `out = dtype(float32(src) * scale)`.

    The product is taken in float32 and rounded to nearest even, bit for bit as torch does.

    Args:
        src: [rows, cols] codes, one byte each.
        scale: float32 [ceil(rows / block_rows), ceil(cols / block_cols)]; None is 1 everywhere.
            One scale a channel is the block (1, cols), one a tensor the block (rows, cols).
        out: [rows, cols] of `out_dtype`.
        rows: Rows of the matrix.
        cols: Columns of the matrix.
        block_rows: Rows that share a scale.
        block_cols: Columns that share a scale.
        out_dtype: "bf16" or "f32".
        threads: Threads to use.
        isa: Instruction set to use.
    """

def fp8_encode(
    src: Buffer,
    src_dtype: _Float,
    scale: Buffer | None,
    out: Buffer,
    rows: SupportsIndex,
    cols: SupportsIndex,
    block_rows: SupportsIndex,
    block_cols: SupportsIndex,
    threads: SupportsIndex = 0,
    isa: _Isa = "auto",
) -> None:
    """Encode a matrix as FP8 (E4M3FN): `out = e4m3(float32(src) / scale)`.

    The quotient is rounded to nearest even and saturates at +-448; NaN stays NaN. The same bits as
    `(src.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)`.

    Args:
        src: [rows, cols] of `src_dtype`.
        src_dtype: "bf16" or "f32".
        scale: float32 [ceil(rows / block_rows), ceil(cols / block_cols)], each finite and above
            zero (else `ValueError`); None is 1 everywhere.
        out: [rows, cols] codes, one byte each.
        rows: Rows of the matrix.
        cols: Columns of the matrix.
        block_rows: Rows that share a scale.
        block_cols: Columns that share a scale.
        threads: Threads to use.
        isa: Instruction set to use.
    """

def block_absmax(
    src: Buffer,
    src_dtype: _Float,
    out: Buffer,
    rows: SupportsIndex,
    cols: SupportsIndex,
    block_rows: SupportsIndex,
    block_cols: SupportsIndex,
    threads: SupportsIndex = 0,
    isa: _Isa = "auto",
) -> None:
    """Find the largest absolute value of each block; NaN where the block holds one.

    Args:
        src: [rows, cols] of `src_dtype`.
        src_dtype: "bf16" or "f32".
        out: float32 [ceil(rows / block_rows), ceil(cols / block_cols)].
        rows: Rows of the matrix.
        cols: Columns of the matrix.
        block_rows: Rows of a block.
        block_cols: Columns of a block.
        threads: Threads to use.
        isa: Instruction set to use.
    """

def saliency(
    rows: Buffer,
    dtype: _RowFloat,
    gates: Buffer,
    sources: Buffer,
    tokens: Buffer,
    gate_sum: Buffer,
    norm_sum: Buffer,
    gate_norm_sum: Buffer,
    norm_max: Buffer,
    dim: SupportsIndex,
    threads: SupportsIndex = 0,
    isa: _Isa = "auto",
) -> int:
    """Add one expert's rows to the sums behind its REAP score (arXiv 2510.13999, eq. 9).

    For each row f with gate weight g and source s: `tokens[s] += 1`, `gate_sum[s] += g`,
    `norm_sum[s] += ||f||`, `gate_norm_sum[s] += g * ||f||`, `norm_max[s] = max(norm_max[s],
    ||f||)`, all in float64, in the order of the rows.

    Args:
        rows: [n, dim] of `dtype`, the expert's outputs before the gate weight.
        dtype: "bf16", "f16" or "f32".
        gates: float32 [n], the gate weights.
        sources: int32 [n], the calibration source of each row, in [0, S) (else `ValueError`, and
            no sum has changed).
        tokens: int64 [S], added to in place, as all that follow.
        gate_sum: float64 [S].
        norm_sum: float64 [S].
        gate_norm_sum: float64 [S].
        norm_max: float64 [S].
        dim: Elements of a row.
        threads: Threads to use.
        isa: Instruction set to use.

    Returns:
        How many rows were left out of every sum, their norm or their gate weight not being finite.
    """

def combine(
    rows: Buffer,
    dtype: _RowFloat,
    gates: Buffer,
    tokens: Buffer,
    out: Buffer,
    dim: SupportsIndex,
    threads: SupportsIndex = 0,
    isa: _Isa = "auto",
) -> None:
    """Add the weighted rows to their tokens: `out[tokens[i]] += gates[i] * float32(rows[i])`.

    Row after row, each product rounded to float32 before it is added.

    Args:
        rows: [n, dim] of `dtype`.
        dtype: "bf16", "f16" or "f32".
        gates: float32 [n].
        tokens: int64 [n], each in [0, T) (else `ValueError`, and `out` has not changed).
        out: float32 [T, dim], added to in place.
        dim: Elements of a row.
        threads: Threads to use.
        isa: Instruction set to use.
    """

def read_ranges(
    files: Iterable[_Path],
    ranges: Iterable[_Range],
    outs: Iterable[Buffer],
    threads: SupportsIndex = 0,
) -> int:
    """Read byte ranges of files into buffers, in the order they lie on disk.

    Args:
        files: Paths; only those that a range names are opened.
        ranges: For each range: index into `files`, offset, nbytes.
        outs: One writable buffer for each range, of exactly its nbytes.
        threads: Threads to use.

    Returns:
        Bytes read.

    Raises:
        EOFError: A file ends inside a range; known before the first byte is read.
        OSError: The file system refused; errno and file name as Python's own.
    """

def write_ranges(
    files: Iterable[_Path],
    ranges: Iterable[_Range],
    srcs: Iterable[Buffer],
    threads: SupportsIndex = 0,
) -> int:
    """Write buffers into byte ranges of files that exist; none is created or cut.

    Args:
        files: Paths; only those that a range names are opened.
        ranges: For each range: index into `files`, offset, nbytes. They must not overlap.
        srcs: One buffer for each range, of exactly its nbytes.
        threads: Threads to use.

    Returns:
        Bytes written.

    Raises:
        OSError: The file system refused; errno and file name as Python's own.
    """

def copy_ranges(
    src_files: Iterable[_Path],
    dst_files: Iterable[_Path],
    ranges: Iterable[_CopyRange],
    threads: SupportsIndex = 0,
) -> int:
    """Copy byte ranges from file to file, inside the kernel where the file systems allow it.

    Args:
        src_files: Paths to read.
        dst_files: Paths of files that exist; none is created or cut.
        ranges: For each range: index into `src_files`, offset, index into `dst_files`, offset,
            nbytes. What is written must overlap nothing else that is read or written.
        threads: Threads to use.

    Returns:
        Bytes copied.

    Raises:
        EOFError: A source ends inside a range; known before the first byte is copied.
        OSError: The file system refused; errno and file names as Python's own.
    """

def preallocate(path: _Path, nbytes: SupportsIndex) -> None:
    """Make the file, or keep it, with exactly `nbytes` and, where possible, blocks behind them.

    What an existing file holds stays, up to `nbytes`. Raises `OSError` (ENOSPC when the disk is
    full); a file that this call made is then removed.
    """

def prefetch(path: _Path, offset: SupportsIndex, nbytes: SupportsIndex) -> None:
    """Ask for a byte range to be in the page cache soon; a hint."""

def drop_cache(path: _Path, offset: SupportsIndex, nbytes: SupportsIndex) -> None:
    """Let clean pages of a byte range leave the page cache; a hint."""

def sync_file(path: _Path) -> None:
    """Wait until the file's bytes and length are on the disk (fdatasync)."""

def sync_directory(path: _Path) -> None:
    """Wait until the directory's entries are on the disk (fsync)."""

def exchange(a: _Path, b: _Path) -> bool:
    """Swap two names in one step; False, with nothing changed, where the system cannot."""

def trim_memory() -> None:
    """Give freed heap memory back to the system, where the C library knows how."""
