"""Writes and copies gathered into few calls of the extension, each of bounded length."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from reap_stream import _native
from reap_stream.checkpoint.disk import output_errors
from reap_stream.checkpoint.providers import local_file
from reap_stream.errors import OutputError, ReadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from typing_extensions import Buffer

    from reap_stream.checkpoint.pieces import Piece
    from reap_stream.checkpoint.recipes import Bytes
    from reap_stream.checkpoint.refs import TensorRef

# An interrupt is seen between batches: about a second's work each, and not many small calls.
_BATCH_NBYTES: Final = 1 << 30
_BATCH_RANGES: Final = 1 << 16
HELD_NBYTES: Final = 32 << 20
"""Computed bytes that are held until they are written, less than a step's results more."""

_OF_THE_TARGET: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


class Batch:
    """Writes and copies that go to the extension in one call each."""

    def __init__(self, directory: Path) -> None:
        """Begin an empty batch.

        Args:
            directory: where the targets lie, for messages.
        """
        self._directory = directory
        self._sources = _Files(local_file)
        self._targets = _Files()
        self._writes: list[tuple[int, int, int]] = []
        self._buffers: list[Buffer] = []
        self._copies: list[tuple[int, int, int, int, int]] = []
        self._nbytes = 0
        self._held = 0

    def add(self, piece: Piece, buffer: Buffer | None, target: Path, offset: int) -> None:
        """Note a piece of the source, from memory where `buffer` holds its tensor, else its file.

        What is noted is written once it makes a batch. A piece may be many gigabytes (a fused
        layer): it is cut into runs of a batch's length.
        """
        for begin in range(0, piece.nbytes, _BATCH_NBYTES):
            nbytes = min(_BATCH_NBYTES, piece.nbytes - begin)
            part = replace(piece, src_offset=piece.src_offset + begin, nbytes=nbytes)
            self._add(part, buffer, target, offset + begin)

    def add_bytes(self, data: Bytes, target: Path, offset: int) -> None:
        """Note bytes that were computed."""
        if not data.nbytes:
            return
        self._writes.append((self._targets.number(target), offset, data.nbytes))
        self._buffers.append(data)
        self._held += data.nbytes
        self._count(data.nbytes)

    def _add(self, piece: Piece, buffer: Buffer | None, target: Path, offset: int) -> None:
        ref, src, nbytes = piece.ref, piece.src_offset, piece.nbytes
        to = self._targets.number(target)
        if buffer is None:
            start = ref.offset + src
            self._copies.append((self._sources.number(ref.file), start, to, offset, nbytes))
        else:
            self._writes.append((to, offset, nbytes))
            self._buffers.append(view_of(buffer, ref)[src : src + nbytes])
        self._count(nbytes)

    def _count(self, nbytes: int) -> None:
        self._nbytes += nbytes
        ranges = len(self._writes) + len(self._copies)
        full = self._nbytes >= _BATCH_NBYTES or ranges >= _BATCH_RANGES
        if full or self._held >= HELD_NBYTES:
            self.flush()

    def flush(self) -> None:
        """Write everything noted.

        Raises:
            OutputError: writing failed; the message names the file.
            ReadError: a file of the source could not be read, or ended early.
        """
        with output_errors(self._directory, self._nbytes), self._source_errors():
            if self._writes:
                _native.write_ranges(self._targets.paths, self._writes, self._buffers)
            if self._copies:
                _native.copy_ranges(self._sources.paths, self._targets.paths, self._copies)
        self._writes, self._buffers, self._copies = [], [], []
        self._nbytes = self._held = 0

    @contextmanager
    def _source_errors(self) -> Iterator[None]:
        """Tell a source that cannot be read from an output that cannot be written."""
        try:
            yield
        except EOFError as error:
            raise ReadError(
                f"a shard of the source became shorter while it was copied: {error}; "
                "restore it and resume"
            ) from error
        except OSError as error:
            # A copy between files names its source whichever of the two failed.
            if error.filename not in self._sources.paths or error.errno in _OF_THE_TARGET:
                raise
            raise ReadError(f"{error.filename}: could not be read: {error}") from error


class _Files:
    """Numbers for files in the order of their first use, as the extension's calls want them."""

    def __init__(self, place: Callable[[Path], Path] | None = None) -> None:
        self.paths: list[str] = []
        self._numbers: dict[Path, int] = {}
        self._place = place

    def number(self, path: Path) -> int:
        if path not in self._numbers:
            self.paths.append(str(path if self._place is None else self._place(path)))
            self._numbers[path] = len(self._numbers)
        return self._numbers[path]


def view_of(buffer: Buffer, ref: TensorRef) -> memoryview:
    """The bytes of a tensor that is in memory.

    Raises:
        OutputError: the buffer is not as long as the tensor; a defect of this package.
    """
    view = memoryview(buffer)
    if view.nbytes != ref.nbytes:
        raise OutputError(
            f"{ref.file}: tensor {ref.name!r} has {ref.nbytes} bytes, "
            f"the buffer said to hold it {view.nbytes}"
        )
    return view.cast("B")
