"""The hidden states of all calibration tokens between two layers, in memory or in a file.

A layer reads a batch and puts its output in the same place, so there is one copy of all hidden
states and never two. Between layers they can be saved, so that a stopped run goes on from there.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Final

import torch

from reap_stream.checkpoint.atomic import write_atomically
from reap_stream.checkpoint.disk import output_errors
from reap_stream.checkpoint.files import open_regular
from reap_stream.checkpoint.header import read_header, render_header
from reap_stream.errors import CheckpointError, ReadError, ReapStreamError, ResumeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

_TAGS: Final = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_TENSOR: Final = "hidden_states"
_LAYER: Final = "layer"
_CHUNK_NBYTES: Final = 16 << 20


class HiddenStates:
    """Hidden states [tokens, hidden] of one dtype; make them with `create`.

    Attributes:
        num_tokens: tokens of the whole corpus, without padding.
        hidden_size: width of the model.
        dtype: bfloat16, float16 or float32.
        nbytes: length of all of them, in memory or in the file.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, spill_path: Path | None) -> None:
        self.num_tokens, self.hidden_size = shape
        self.dtype = dtype
        self.row_nbytes = self.hidden_size * dtype.itemsize
        self.nbytes = self.num_tokens * self.row_nbytes
        self._spill_path = spill_path
        self._fd = -1
        self._memory = torch.empty(shape if spill_path is None else (0, 0), dtype=dtype)
        if spill_path is not None:
            self._fd = _open_spill(spill_path, self.nbytes)

    @classmethod
    def create(
        cls, num_tokens: int, hidden_size: int, dtype: torch.dtype, *, spill_path: Path | None
    ) -> HiddenStates:
        """Reserve room; what it holds is undefined until it is stored or restored.

        Args:
            num_tokens: tokens of the whole corpus.
            hidden_size: width of the model.
            dtype: bfloat16, float16 or float32.
            spill_path: a file to make and hold them in; None for memory. The file has no name
                while it is in use and is gone when this object is closed or the process ends.

        Raises:
            ReapStreamError: a dtype or shape that hidden states do not have.
            OutputError: the file exists, cannot be made, or the disk is too small.
        """
        if dtype not in _TAGS or num_tokens < 1 or hidden_size < 1:
            raise ReapStreamError(
                f"hidden states cannot be {dtype} [{num_tokens}, {hidden_size}]: they are bfloat16,"
                " float16 or float32 of at least one token"
            )
        return cls((num_tokens, hidden_size), dtype, spill_path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give memory or file back; nothing can be loaded any more."""
        self._memory = torch.empty((0, 0), dtype=self.dtype)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def load(self, start: int, stop: int) -> torch.Tensor:
        """Return the hidden states of tokens `start` to `stop`, on the CPU.

        Returns:
            [stop - start, hidden]; in memory a view, which the next `store` there changes; from a
            file a tensor of its own.

        Raises:
            ReapStreamError: tokens out of range.
            ReadError: the file could not be read.
        """
        self._check_range(start, stop)
        if self._spill_path is None:
            return self._memory[start:stop]
        out = torch.empty((stop - start, self.hidden_size), dtype=self.dtype)
        _read_into(self._fd, _bytes_of(out), start * self.row_nbytes, self._spill_path)
        return out

    def store(self, start: int, hidden: torch.Tensor) -> None:
        """Put hidden states in the place of tokens from `start` on.

        Args:
            start: first token.
            hidden: [n, hidden] of this dtype, on any device.

        Raises:
            ReapStreamError: wrong shape or dtype, or tokens out of range.
            OutputError: the file could not be written.
        """
        if hidden.dtype != self.dtype or hidden.ndim != 2 or hidden.shape[1] != self.hidden_size:
            raise ReapStreamError(
                f"cannot store {hidden.dtype} {list(hidden.shape)} among hidden states of"
                f" {self.dtype} [{self.num_tokens}, {self.hidden_size}]"
            )
        self._check_range(start, start + hidden.shape[0])
        if self._spill_path is None:
            self._memory[start : start + hidden.shape[0]].copy_(hidden.detach())
            return
        data = hidden.detach().cpu().contiguous()
        _write_from(self._fd, _bytes_of(data), start * self.row_nbytes, self._spill_path)

    def save(self, path: Path, *, layer: int, metadata: Mapping[str, str] | None = None) -> None:
        """Write a snapshot as a safetensors file; it appears whole or not at all.

        Args:
            path: where; an older snapshot there is replaced.
            layer: index of the layer whose input these hidden states are.
            metadata: further strings to keep, e.g. the fingerprint of the run.

        Raises:
            OutputError: it could not be written.
            ReadError: the spill file could not be read.
        """
        shape = (self.num_tokens, self.hidden_size)
        entry = (_TENSOR, _TAGS[self.dtype], shape, 0, self.nbytes)
        header = render_header([entry], {**(metadata or {}), _LAYER: str(layer)})
        chunks = (_bytes_of(self.load(start, stop)) for start, stop in self._chunks())
        write_atomically(path, itertools.chain([header], chunks), self.nbytes)

    def restore(self, path: Path) -> dict[str, str]:
        """Read a snapshot in place of what is held.

        Returns:
            The metadata it was saved with, and ``"layer"``, the layer's index in decimal.

        Raises:
            ResumeError: no snapshot, a damaged one, or one of another shape or dtype.
        """
        try:
            header = read_header(path)
            ref = header.tensors.get(_TENSOR)
            expected = (_TAGS[self.dtype], (self.num_tokens, self.hidden_size))
            layer = header.metadata.get(_LAYER, "")
            found = None if ref is None else (ref.dtype, ref.shape)
            if ref is None or found != expected or not layer.isdecimal() or len(header.tensors) > 1:
                raise ResumeError(
                    f"{path}: holds {found} at layer {layer!r}, this run needs {_TENSOR} of"
                    f" {expected}: remove it to start over"
                )
            with open_regular(path) as (fd, _):
                for start, stop in self._chunks():
                    self._restore_chunk(fd, path, ref.offset, start, stop)
        except (CheckpointError, ReadError) as error:
            raise ResumeError(f"no snapshot to resume from: {error}") from error
        return header.metadata

    def _restore_chunk(self, fd: int, path: Path, offset: int, start: int, stop: int) -> None:
        if self._spill_path is None:
            chunk = self._memory[start:stop]
        else:
            chunk = torch.empty((stop - start, self.hidden_size), dtype=self.dtype)
        _read_into(fd, _bytes_of(chunk), offset + start * self.row_nbytes, path)
        if self._spill_path is not None:
            self.store(start, chunk)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        step = max(1, _CHUNK_NBYTES // self.row_nbytes)
        for start in range(0, self.num_tokens, step):
            yield start, min(start + step, self.num_tokens)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise ReapStreamError(
                f"tokens {start} to {stop} are out of range: there are {self.num_tokens}"
            )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, not a copy; numpy knows no bfloat16."""
    array: NDArray[np.uint8] = tensor.view(torch.uint8).reshape(-1).numpy()
    return array.data


def _open_spill(path: Path, nbytes: int) -> int:
    """Make a file that vanishes with the process and whose disk space is already its own."""
    with output_errors(path, nbytes):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            path.unlink()
            _reserve(fd, nbytes)
        except OSError:
            os.close(fd)
            raise
    return fd


def _reserve(fd: int, nbytes: int) -> None:
    # Not every system can reserve space; there a full disk shows when hidden states are stored.
    allocate = getattr(os, "posix_fallocate", None)
    if allocate is None:
        os.ftruncate(fd, nbytes)
    else:
        allocate(fd, 0, nbytes)


def _read_into(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(buffer):
        count = _preadv(fd, buffer[done:], offset + done, path)
        if count == 0:
            raise ReadError(
                f"{path}: ended at byte {offset + done}, {offset + len(buffer)} bytes were expected"
            )
        done += count


def _preadv(fd: int, buffer: memoryview, offset: int, path: Path) -> int:
    try:
        return os.preadv(fd, [buffer], offset)
    except OSError as error:
        raise ReadError(f"{path}: cannot be read at byte {offset}: {error}") from error


def _write_from(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    done = 0
    with output_errors(path, len(buffer)):
        while done < len(buffer):
            done += os.pwrite(fd, buffer[done:], offset + done)
