"""The hidden states of all calibration tokens between two layers, in memory or in a file.

A layer reads a batch and puts its output in the same place, so there is one copy of all hidden
states and never two. Between layers they can be saved, so that a stopped run goes on from there.
What else a family hands from layer to layer lies beside them; see `carried`.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import TYPE_CHECKING, Final

import torch

from reap_stream.calibration.carried import Carried, bytes_of
from reap_stream.calibration.spilling import open_spill, read_into, write_from
from reap_stream.checkpoint.atomic import write_atomically
from reap_stream.checkpoint.files import open_regular
from reap_stream.checkpoint.header import read_header, render_header
from reap_stream.errors import CheckpointError, ReadError, ReapStreamError, ResumeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Self

_TAGS: Final = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_TENSOR: Final = "hidden_states"
_LAYER: Final = "layer"
_CHUNK_NBYTES: Final = 16 << 20


class HiddenStates:
    """Hidden states [tokens, hidden] of one dtype; make them with `create`.

    Where a family keeps several streams of hidden states, they are [tokens, streams, hidden].

    Attributes:
        num_tokens: tokens of the whole corpus, without padding.
        token_shape: shape of one token's: the width of the model, or streams and width.
        dtype: bfloat16, float16 or float32.
        nbytes: length of all of them, in memory or in the file.
        carried: what else goes from layer to layer.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, spill_path: Path | None
    ) -> None:  # fmt: skip
        self.num_tokens, *rest = shape
        self.token_shape = tuple(rest)
        self.dtype = dtype
        self.row_nbytes = math.prod(rest) * dtype.itemsize
        self.nbytes = self.num_tokens * self.row_nbytes
        self._spill_path = spill_path
        self._fd = -1
        self._memory = torch.empty(shape if spill_path is None else (0, *rest), dtype=dtype)
        if spill_path is not None:
            self._fd = open_spill(spill_path, self.nbytes)
        self.carried = Carried(spill_path and spill_path.with_name(f"{spill_path.name}-carried"))

    @classmethod
    def create(
        cls,
        num_tokens: int,
        token_shape: int | tuple[int, ...],
        dtype: torch.dtype,
        *,
        spill_path: Path | None,
    ) -> HiddenStates:
        """Reserve room; what it holds is undefined until it is stored or restored.

        Args:
            num_tokens: tokens of the whole corpus.
            token_shape: width of the model, or the whole shape of one token's hidden states.
            dtype: bfloat16, float16 or float32.
            spill_path: a file to make and hold them in; None for memory. The file has no name
                while it is in use and is gone when this object is closed or the process ends.

        Raises:
            ReapStreamError: a dtype or shape that hidden states do not have.
            OutputError: the file exists, cannot be made, or the disk is too small.
        """
        shape = (num_tokens, *((token_shape,) if isinstance(token_shape, int) else token_shape))
        if dtype not in _TAGS or min(shape) < 1 or len(shape) == 1:
            raise ReapStreamError(
                f"hidden states cannot be {dtype} {list(shape)}: they are bfloat16, float16 or"
                " float32 of at least one token"
            )
        return cls(shape, dtype, spill_path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give memory or file back; nothing can be loaded any more."""
        self._memory = torch.empty((0, *self.token_shape), dtype=self.dtype)
        self.carried.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def load(self, start: int, stop: int) -> torch.Tensor:
        """Return the hidden states of tokens `start` to `stop`, on the CPU.

        Returns:
            [stop - start, *token_shape]; in memory a view, which the next `store` there changes; from a
            file a tensor of its own.

        Raises:
            ReapStreamError: tokens out of range.
            ReadError: the file could not be read.
        """
        self._check_range(start, stop)
        if self._spill_path is None:
            return self._memory[start:stop]
        out = torch.empty((stop - start, *self.token_shape), dtype=self.dtype)
        read_into(self._fd, bytes_of(out), start * self.row_nbytes, self._spill_path)
        return out

    def store(self, start: int, hidden: torch.Tensor) -> None:
        """Put hidden states in the place of tokens from `start` on.

        Args:
            start: first token.
            hidden: [n, *token_shape] of this dtype, on any device.

        Raises:
            ReapStreamError: wrong shape or dtype, or tokens out of range.
            OutputError: the file could not be written.
        """
        if hidden.dtype != self.dtype or tuple(hidden.shape[1:]) != self.token_shape:
            raise ReapStreamError(
                f"cannot store {hidden.dtype} {list(hidden.shape)} among hidden states of"
                f" {self.dtype} {list(self._shape)}"
            )
        self._check_range(start, start + hidden.shape[0])
        if self._spill_path is None:
            self._memory[start : start + hidden.shape[0]].copy_(hidden.detach())
            return
        data = hidden.detach().cpu().contiguous()
        write_from(self._fd, bytes_of(data), start * self.row_nbytes, self._spill_path)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.num_tokens, *self.token_shape)

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
        entry = (_TENSOR, _TAGS[self.dtype], self._shape, 0, self.nbytes)
        entries = [entry, *self.carried.entries(self.nbytes)]
        header = render_header(entries, {**(metadata or {}), _LAYER: str(layer)})
        chunks = (bytes_of(self.load(start, stop)) for start, stop in self._chunks())
        everything: itertools.chain[bytes | memoryview] = itertools.chain(
            [header], chunks, self.carried.contents()
        )
        write_atomically(path, everything, entries[-1][-1])

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
            expected = (_TAGS[self.dtype], self._shape)
            layer = header.metadata.get(_LAYER, "")
            found = None if ref is None else (ref.dtype, ref.shape)
            rest = {name: t for name, t in header.tensors.items() if name != _TENSOR}
            known = all(map(self.carried.is_entry, rest))
            if ref is None or found != expected or not layer.isdecimal() or not known:
                raise ResumeError(
                    f"{path}: holds {found} at layer {layer!r}, this run needs {_TENSOR} of"
                    f" {expected}: remove it to start over"
                )
            with open_regular(path) as (fd, _):
                for start, stop in self._chunks():
                    self._restore_chunk(fd, path, ref.offset, start, stop)
                self.carried.restore(fd, path, rest)
        except (CheckpointError, ReadError) as error:
            raise ResumeError(f"no snapshot to resume from: {error}") from error
        return header.metadata

    def _restore_chunk(self, fd: int, path: Path, offset: int, start: int, stop: int) -> None:
        if self._spill_path is None:
            chunk = self._memory[start:stop]
        else:
            chunk = torch.empty((stop - start, *self.token_shape), dtype=self.dtype)
        read_into(fd, bytes_of(chunk), offset + start * self.row_nbytes, path)
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
