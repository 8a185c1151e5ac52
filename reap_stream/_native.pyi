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
_Code: TypeAlias = Literal["e2m1", "u4", "u8"]
_Scale: TypeAlias = Literal["bf16", "f16", "f32", "u8"]
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

def packed_decode(
    codes: Buffer,
    code_type: _Code,
    scale: Buffer,
    scale_dtype: _Scale,
    scale_table: Buffer | None,
    zero: Buffer | None,
    out: Buffer,
    rows: SupportsIndex,
    cols: SupportsIndex,
    group: SupportsIndex,
    row_nbytes: SupportsIndex,
    out_dtype: _Float,
    threads: SupportsIndex = 0,
    isa: _Isa = "auto",
) -> None:
    """Decode rows of packed codes: `out = dtype((float32(code) - zero) * float32(scale))`.

    `group` neighbours in a row share a scale and a zero point. The product is taken in float32 and
    rounded to nearest even, bit for bit as torch does.

    Args:
        codes: rows of `row_nbytes` bytes. Of two 4-bit codes in a byte the low half comes first,
            so 32-bit words of eight codes are such bytes too.
        code_type: "e2m1" (4-bit floats: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), "u4" or
            "u8" (integers).
        scale: [rows, ceil(cols / group)] of `scale_dtype`.
        scale_dtype: "bf16", "f16", "f32", or "u8" for bytes that `scale_table` gives a meaning.
        scale_table: float32 [256] for "u8", else None.
        zero: uint8 [rows, ceil(cols / group)]; None is 8 for "u4" and 128 for "u8". Not for "e2m1".
        out: [rows, cols] of `out_dtype`.
        rows: Rows of the matrix.
        cols: Columns of the matrix.
        group: Neighbours that share a scale; of 4-bit codes an even number, or all of the row.
        row_nbytes: Bytes from one row of codes to the next; what is behind the last code of a row
            is not looked at.
        out_dtype: "bf16" or "f32".
        threads: Threads to use.
        isa: Instruction set to use.
    """

def rearranged_decode(
    codes: Buffer,
    layout: Literal["gptq", "awq", "int8"],
    bits: SupportsIndex,
    scale: Buffer,
    scale_dtype: _RowFloat,
    zero: Buffer | None,
    zero_offset: SupportsIndex,
    group_of: Buffer | None,
    out: Buffer,
    rows: SupportsIndex,
    cols: SupportsIndex,
    group: SupportsIndex,
    out_dtype: _Float,
    threads: SupportsIndex = 0,
    isa: _Isa = "auto",
) -> None:
    """Decode integer codes that do not lie row after row.

    `out = dtype((float32(code) - zero) * float32(scale))`, the product rounded to nearest even, bit
    for bit as torch does. With p = 32 / bits, n a row and k a column:

    * "gptq": int32 words [cols / p, rows] of p codes down the columns, lowest bits first; scale
      [groups, rows]; zero int32 [groups, rows / p].
    * "awq": int32 words [cols, rows / 8], code i of a word being row (0, 2, 4, 6, 1, 3, 5, 7)[i] of
      its eight; scale [groups, rows]; zero int32 [groups, rows / 8] in the same order.
    * "int8": int8 [rows, cols]; scale [rows, groups]; zero int8 [rows, groups].

    Args:
        codes: the codes, as above.
        layout: "gptq", "awq" or "int8".
        bits: Bits of a code: 4 of "awq", 8 of "int8", either of "gptq".
        scale: the scales, as above; there are ceil(cols / group) groups.
        scale_dtype: "bf16", "f16" or "f32".
        zero: the zero points, as above; None is the middle of the codes, 0 of "int8".
        zero_offset: 0, or 1 where one less than each zero point is stored; it is added to the words
            as to one number, with carry, as it was taken off with borrow. Not for "int8".
        group_of: int32 [cols], the group of each column (else `ValueError` where there is no such
            group); None is k // group.
        out: [rows, cols] of `out_dtype`.
        rows: Rows of the matrix; of words a multiple of p, as `cols`.
        cols: Columns of the matrix.
        group: Neighbours in a row that share a scale; of 4-bit codes an even number, or all.
        out_dtype: "bf16" or "f32".
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
    output_max: Buffer,
    dim: SupportsIndex,
    threads: SupportsIndex = 0,
    isa: _Isa = "auto",
) -> int:
    """Add one expert's rows to the sums behind its REAP score (arXiv 2510.13999, eq. 9).

    For each row f with gate weight g and source s: `tokens[s] += 1`, `gate_sum[s] += g`,
    `norm_sum[s] += ||f||`, `gate_norm_sum[s] += g * ||f||`, `norm_max[s] = max(norm_max[s],
    ||f||)`, all in float64, in the order of the rows, and `output_max[s] = max(output_max[s],
    max |f_i|)`.

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
        output_max: float64 [S].
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
