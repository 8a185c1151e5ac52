"""Writes the planned shards: headers and room first, then each layer into its own byte ranges.

The room is taken before the first byte, so a full disk is found in the first second. A layer's
ranges are fixed, so layers may come in any order and a layer interrupted half-way is simply
written again. Bytes that are in memory go out from there; all others go from the source's file to
ours without passing through Python.
"""

from __future__ import annotations

import errno
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from reap_stream import _native
from reap_stream.checkpoint.disk import free_nbytes, output_errors, sync_directory
from reap_stream.checkpoint.layout import layer_tensors
from reap_stream.checkpoint.pieces import Piece, kept_faults, pieces
from reap_stream.errors import NoRoomError, OutputError, ReadError, ResumeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from typing_extensions import Buffer

    from reap_stream.checkpoint.layout import OutputPlan, OutputTensor
    from reap_stream.checkpoint.refs import Role, TensorRef

# An interrupt is seen between batches: about a second's work each, and not many small calls.
_BATCH_NBYTES: Final = 1 << 30
_BATCH_RANGES: Final = 1 << 16
_OF_THE_TARGET: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


class Written(NamedTuple):
    """How much a call wrote.

    Attributes:
        nbytes: bytes put into the shards.
        copied_nbytes: the part of them that had to be read from the source's files.
    """

    nbytes: int
    copied_nbytes: int


def check_free_space(directory: Path, nbytes: int) -> None:
    """Check that a disk has room, before anything is written to it.

    Args:
        directory: where the files will lie; it need not exist yet.
        nbytes: bytes of all of them; with several targets, their sum.

    Raises:
        OutputError: there is less room than that.
    """
    free = free_nbytes(directory)
    if free < nbytes:
        raise NoRoomError(
            f"{directory}: the disk has {free} bytes free, the pruned checkpoint needs {nbytes}; "
            "make room or choose another --output"
        )


class OutputWriter:
    """The shards of one pruned checkpoint while they are being written."""

    def __init__(
        self,
        directory: Path,
        plan: OutputPlan,
        source: Mapping[str, TensorRef],
        roles: Mapping[str, Role],
    ) -> None:
        """Bind a plan to a directory; nothing is touched yet.

        Args:
            directory: where the shards will lie.
            plan: what they hold.
            source: the source's tensors by name.
            roles: as given to `plan_layout`.
        """
        self.directory = directory
        self.plan = plan
        self._source = source
        self._roles = roles
        self._groups = layer_tensors(plan)
        self._paths = [directory / shard.filename for shard in plan.shards]
        self._lock = threading.Lock()
        self._touched: set[int] = set()
        self._loss: str | None = None

    def allocate(self) -> None:
        """Take the room of every shard and write its header; what was there before is gone.

        Raises:
            OutputError: there is not enough room, or a shard cannot be created.
        """
        with output_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self._paths:
                path.unlink(missing_ok=True)
        check_free_space(self.directory, self.plan.nbytes)
        for path, shard in zip(self._paths, self.plan.shards, strict=True):
            with output_errors(path, shard.nbytes):
                path.write_bytes(shard.header)
                _native.preallocate(str(path), shard.nbytes)
        self._touch(range(len(self._paths)))
        with output_errors(self.directory):
            sync_directory(self.directory)

    def reopen(self) -> None:
        """Take up shards allocated earlier, with whatever layers they already hold.

        Raises:
            ResumeError: a shard is missing, or its length or header is not what the plan says.
        """
        for path, shard in zip(self._paths, self.plan.shards, strict=True):
            if not path.is_file():
                raise ResumeError(f"{path}: missing; start anew with --overwrite")
            nbytes = path.stat().st_size
            if nbytes != shard.nbytes:
                raise ResumeError(
                    f"{path}: {nbytes} bytes, the plan says {shard.nbytes}; "
                    "start anew with --overwrite"
                )
            with path.open("rb") as file:
                header = file.read(len(shard.header))
            if header != shard.header:
                raise ResumeError(
                    f"{path}: its header is not the planned one; start anew with --overwrite"
                )

    def write_layer(
        self,
        layer: int | None,
        kept: Mapping[int, Sequence[int]],
        resident: Callable[[TensorRef], Buffer | None],
    ) -> Written:
        """Write all tensors whose bytes the kept experts of one layer decide.

        Args:
            layer: the layer; None for all tensors copied whole.
            kept: source numbers of the kept experts by layer, rising; new number = position.
            resident: gives the bytes of a source tensor (`nbytes` of it, contiguous) if they are in
                memory, None if they are to be copied from its file.

        Raises:
            OutputError: the kept experts do not fit the plan, or writing failed.
            ReadError: a shard of the source could not be read.
        """
        return self.write(self._groups.get(layer, []), kept, resident)

    def write(
        self,
        outs: Sequence[OutputTensor],
        kept: Mapping[int, Sequence[int]],
        resident: Callable[[TensorRef], Buffer | None],
    ) -> Written:
        """Write some tensors of the plan; arguments and errors as for `write_layer`."""
        layers = {out.layer for out in outs if out.layer is not None}
        faults = kept_faults(kept, sorted(layers), self.plan)
        if faults:
            raise OutputError(f"{self.directory}: {faults[0]}")
        written = copied = 0
        batch = _Batch(self.directory)
        for out, piece in self._parts(outs, kept):
            buffer = resident(piece.ref)
            batch.add(piece, buffer, self._paths[out.shard], out.offset + piece.dst_offset)
            written += piece.nbytes
            copied += piece.nbytes if buffer is None else 0
        batch.flush()
        self._touch(out.shard for out in outs)
        return Written(written, copied)

    def sync(self) -> None:
        """Bring everything written before this call onto the disk.

        May run in another thread than `write`: what is written meanwhile is left to the next call.

        Raises:
            OutputError: the system reports that bytes were lost on the way. So does every later
                call: the system reports a loss once, and what was lost is not known.
        """
        with self._lock:
            touched, self._touched = self._touched, set()
        if self._loss is not None:
            raise OutputError(self._loss)
        try:
            for shard in sorted(touched):
                with output_errors(self._paths[shard]):
                    _native.sync_file(str(self._paths[shard]))
        except OutputError as error:
            self._loss = str(error)
            raise

    def _touch(self, shards: Iterable[int]) -> None:
        with self._lock:
            self._touched.update(shards)

    def _parts(
        self, outs: Sequence[OutputTensor], kept: Mapping[int, Sequence[int]]
    ) -> Iterator[tuple[OutputTensor, Piece]]:
        """Pieces of at most a batch's bytes: a fused layer may be one run of many gigabytes."""
        for out in outs:
            for piece in pieces(out, self._source, self._roles, kept):
                for begin in range(0, piece.nbytes, _BATCH_NBYTES):
                    nbytes = min(_BATCH_NBYTES, piece.nbytes - begin)
                    src, dst = piece.src_offset + begin, piece.dst_offset + begin
                    yield out, Piece(piece.ref, src, dst, nbytes)


class _Batch:
    """Writes and copies that go to the extension in one call each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sources = _Files()
        self._targets = _Files()
        self._writes: list[tuple[int, int, int]] = []
        self._buffers: list[memoryview] = []
        self._copies: list[tuple[int, int, int, int, int]] = []
        self._nbytes = 0

    def add(self, piece: Piece, buffer: Buffer | None, target: Path, offset: int) -> None:
        """Note one piece; what is noted is written once it makes a batch."""
        ref, src, nbytes = piece.ref, piece.src_offset, piece.nbytes
        to = self._targets.number(target)
        if buffer is None:
            start = ref.offset + src
            self._copies.append((self._sources.number(ref.file), start, to, offset, nbytes))
        else:
            self._writes.append((to, offset, nbytes))
            self._buffers.append(_view(buffer, ref)[src : src + nbytes])
        self._nbytes += nbytes
        if self._nbytes >= _BATCH_NBYTES or len(self._writes) + len(self._copies) >= _BATCH_RANGES:
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
        self._writes, self._buffers, self._copies, self._nbytes = [], [], [], 0

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

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._numbers: dict[Path, int] = {}

    def number(self, path: Path) -> int:
        if path not in self._numbers:
            self._numbers[path] = len(self.paths)
            self.paths.append(str(path))
        return self._numbers[path]


def _view(buffer: Buffer, ref: TensorRef) -> memoryview:
    view = memoryview(buffer)
    if view.nbytes != ref.nbytes:
        raise OutputError(
            f"{ref.file}: tensor {ref.name!r} has {ref.nbytes} bytes, "
            f"the buffer said to hold it {view.nbytes}"
        )
    return view.cast("B")
