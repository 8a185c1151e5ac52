"""What some families hand from layer to layer beside hidden states, batch by batch.

An indexer's choice of tokens that later layers share, keys and values that they reuse, a router's
own state: tensors of any shape, one of each kind for each batch, kept as long as a layer that has
not run yet needs them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from reap_stream.calibration.spilling import open_spill, read_into, write_from
from reap_stream.errors import ResumeError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from reap_stream.checkpoint.refs import TensorRef

_DTYPES: Final = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_TAGS: Final = {dtype: tag for tag, dtype in _DTYPES.items()}
_PREFIX: Final = "carried"

Entry = tuple[str, str, tuple[int, ...], int, int]


class Key(NamedTuple):
    """Names a tensor: which output of which layer it is, and of which batch.

    Attributes:
        layer: the layer that gave it.
        number: which of its outputs it is.
        start: first token of the batch.
    """

    layer: int
    number: int
    start: int


class _Place(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    nbytes: int


class Carried:
    """Tensors by `Key`, in memory or in a file.

    Args:
        spill_path: a file to hold them in, made when there is something to hold; None: memory.
    """

    def __init__(self, spill_path: Path | None) -> None:
        self._spill_path = spill_path
        self._fd = -1
        self._memory: dict[Key, torch.Tensor] = {}
        self._places: dict[Key, _Place] = {}
        self._free: dict[int, list[int]] = defaultdict(list)
        self._end = 0

    def close(self) -> None:
        """Give memory or file back."""
        self._memory.clear()
        self._places.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def load(self, key: Key) -> torch.Tensor:
        """The tensor, on the CPU."""
        if self._spill_path is None:
            return self._memory[key]
        place = self._places[key]
        out = torch.empty(place.shape, dtype=place.dtype)
        read_into(self._fd, bytes_of(out), place.offset, self._spill_path)
        return out

    def store(self, key: Key, value: torch.Tensor) -> None:
        """Keep a tensor; what has this key already is replaced.

        Raises:
            OutputError: the file could not be written.
        """
        data = value.detach().to("cpu", copy=self._spill_path is None).contiguous()
        if self._spill_path is None:
            self._memory[key] = data
            return
        self._forget(key)
        if self._fd < 0:
            self._fd = open_spill(self._spill_path, 0)
        # Most outputs of a batch are as long as those of the layer before: files do not grow.
        free = self._free[data.nbytes]
        offset = free.pop() if free else self._end
        self._end = max(self._end, offset + data.nbytes)
        write_from(self._fd, bytes_of(data), offset, self._spill_path)
        self._places[key] = _Place(tuple(data.shape), data.dtype, offset, data.nbytes)

    def keep_only(self, start: int, outputs: Collection[tuple[int, int]]) -> None:
        """Forget all of a batch but the outputs (layer, number) named."""
        held: Collection[Key] = self._memory if self._spill_path is None else self._places
        for key in [key for key in held if key.start == start and key[:2] not in outputs]:
            self._forget(key)

    def _forget(self, key: Key) -> None:
        self._memory.pop(key, None)
        place = self._places.pop(key, None)
        if place is not None:
            self._free[place.nbytes].append(place.offset)

    def entries(self, offset: int) -> list[Entry]:
        """Names, tags, shapes and byte ranges from `offset` on, for a snapshot's header."""
        made = []
        for key, shape, dtype, nbytes in self._held():
            name = ".".join([_PREFIX, *map(str, key)])
            made.append((name, _TAGS[dtype], shape, offset, offset + nbytes))
            offset += nbytes
        return made

    def contents(self) -> Iterator[memoryview]:
        """The bytes of `entries`, in their order."""
        for key, *_ in self._held():
            yield bytes_of(self.load(key))

    def is_entry(self, name: str) -> bool:
        """Whether a tensor of a snapshot is one of these."""
        head, *numbers = name.split(".")
        return (
            head == _PREFIX
            and len(numbers) == len(Key._fields)
            and all(map(str.isdecimal, numbers))
        )

    def restore(self, fd: int, path: Path, refs: Mapping[str, TensorRef]) -> None:
        """Take up what `contents` wrote, in place of what is held.

        Raises:
            ResumeError: a dtype that is never carried.
            ReadError: the snapshot could not be read.
        """
        self.close()
        self._free.clear()
        self._end = 0
        for name, ref in refs.items():
            if ref.dtype not in _DTYPES:
                raise ResumeError(f"{path}: {name!r} is {ref.dtype}: remove it to start over")
            value = torch.empty(ref.shape, dtype=_DTYPES[ref.dtype])
            read_into(fd, bytes_of(value), ref.offset, path)
            self.store(Key(*map(int, name.split(".")[1:])), value)

    def _held(self) -> list[tuple[Key, tuple[int, ...], torch.dtype, int]]:
        places = [(key, p.shape, p.dtype, p.nbytes) for key, p in self._places.items()]
        own = [(k, tuple(t.shape), t.dtype, t.nbytes) for k, t in self._memory.items()]
        return sorted([*places, *own], key=lambda held: held[0])


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not a copy; numpy knows no bfloat16."""
    array: NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return array.data
