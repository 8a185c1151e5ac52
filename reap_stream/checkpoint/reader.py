"""Positioned reads of tensor bytes into the caller's own buffers.

Nothing is mapped: mapped pages count as resident memory, and bounded memory is what this package
promises. The reads themselves are `reap_stream._native`'s; here requests are checked against the
checkpoint's headers, failures get the name of a tensor, and bytes are counted.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from reap_stream import _native
from reap_stream.checkpoint.providers import local_files, prefetch_files
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.checkpoint.strict_json import shown
from reap_stream.errors import ReadError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray
    from typing_extensions import Self

WritableBuffer: TypeAlias = Any
"""Anything with the buffer protocol; `collections.abc.Buffer` needs Python 3.12."""

ReadRequest: TypeAlias = tuple[TensorRef, int, int, WritableBuffer]
"""(tensor, first byte within it, bytes, buffer of exactly that length)."""

_PREFETCH_NBYTES: Final = 64 * 2**20
"""Longest single hint: `close` waits for the hint in progress, and for no more than one."""


class Reader:
    """Reads ranges of tensors and counts the bytes; safe to share between threads.

    No file is held open between calls. A context manager: leaving it drops the hints that have
    not been given yet.
    """

    def __init__(self, threads: int = 0) -> None:
        """Set up a reader; no thread is started before the first `prefetch`.

        Args:
            threads: threads for one batch of reads; 0 leaves the number to the extension.
        """
        self._threads = threads
        self._nbytes = 0
        self._lock = threading.Lock()
        self._hints = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reap-prefetch")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def bytes_read(self) -> int:
        """Bytes delivered so far, over all threads; hints are not counted."""
        with self._lock:
            return self._nbytes

    def read(self, ref: TensorRef) -> NDArray[np.uint8]:
        """Return all bytes of a tensor in a fresh array, uint8 of shape [ref.nbytes].

        Raises:
            ReadError: as `read_into`.
        """
        out = np.empty(ref.nbytes, dtype=np.uint8)
        self.read_into([(ref, 0, ref.nbytes, out)])
        return out

    def read_into(self, requests: Sequence[ReadRequest]) -> None:
        """Fill each request's buffer with its range of its tensor, all in one batch.

        Args:
            requests: (tensor, start, nbytes, buffer): `nbytes` bytes from byte `start` of the
                tensor. The buffer is writable, C-contiguous and exactly `nbytes` long; buffers
                of one batch do not overlap.

        Raises:
            ReadError: before any read, a range outside its tensor or a buffer that does not fit;
                afterwards, a file that is missing, became shorter, or could not be read. Buffers
                then hold undefined bytes.
        """
        for request in requests:
            _check_request(*request)
        wanted = [request for request in requests if request[2]]
        if not wanted:
            return
        files = list(dict.fromkeys(ref.file for ref, *_ in wanted))
        position = {file: i for i, file in enumerate(files)}
        ranges = [(position[ref.file], ref.offset + start, n) for ref, start, n, _ in wanted]
        outs = [out for *_, out in wanted]
        places = [str(file) for file in local_files(files)]
        try:
            nbytes = _native.read_ranges(places, ranges, outs, self._threads)
        except (OSError, EOFError) as error:
            raise _read_error(wanted, error) from error
        with self._lock:
            self._nbytes += nbytes

    def prefetch(self, refs: Iterable[TensorRef]) -> None:
        """Ask the system, from a background thread, to bring tensors into its page cache.

        Returns at once. A hint changes no result, so its failures are ignored on purpose: a file
        that cannot be read is reported by the read that follows. After `close` hints are dropped.
        Shards that are not on the disk are sent for.
        """
        spans = coalesce(refs)
        prefetch_files(dict.fromkeys(file for file, _, _ in spans))
        for file, offset, nbytes in spans:
            with suppress(RuntimeError):
                self._hints.submit(_hint, str(file), offset, nbytes)

    def close(self) -> None:
        """Drop the hints not given yet and join the background thread; may be called twice."""
        self._hints.shutdown(wait=True, cancel_futures=True)


def coalesce(refs: Iterable[TensorRef]) -> list[tuple[Path, int, int]]:
    """Join tensors that touch in a file into (file, offset, nbytes), cut to bounded lengths."""
    spans: list[tuple[Path, int, int]] = []
    for ref in sorted(refs, key=lambda ref: (ref.file, ref.offset)):
        if spans and spans[-1][0] == ref.file and ref.offset <= spans[-1][2]:
            file, begin, end = spans.pop()
            spans.append((file, begin, max(end, ref.offset + ref.nbytes)))
        elif ref.nbytes:
            spans.append((ref.file, ref.offset, ref.offset + ref.nbytes))
    return [
        (file, offset, min(_PREFETCH_NBYTES, end - offset))
        for file, begin, end in spans
        for offset in range(begin, end, _PREFETCH_NBYTES)
    ]


def _hint(file: str, offset: int, nbytes: int) -> None:
    with suppress(OSError):
        _native.prefetch(file, offset, nbytes)


def _check_request(ref: TensorRef, start: int, nbytes: int, out: WritableBuffer) -> None:
    where = f"{ref.file}: tensor {shown(ref.name)}"
    if start < 0 or nbytes < 0 or start + nbytes > ref.nbytes:
        raise ReadError(
            f"{where}: {nbytes} bytes from byte {start} were asked for, it has {ref.nbytes}"
        )
    view = memoryview(out)
    if view.readonly or not view.c_contiguous or view.nbytes != nbytes:
        raise ReadError(
            f"{where}: {nbytes} bytes need a writable, contiguous buffer of that length; this one"
            f" has {view.nbytes} bytes, readonly={view.readonly}, contiguous={view.c_contiguous}"
        )


def _read_error(requests: Sequence[ReadRequest], error: OSError | EOFError) -> ReadError:
    """Name the tensor behind a failed batch: whose range is past the file's end, or whose file."""
    for ref, start, nbytes, _ in requests:
        end = ref.offset + start + nbytes
        present = _file_nbytes(ref.file)
        if present is not None and present < end:
            return ReadError(
                f"{ref.file}: tensor {shown(ref.name)} ends at byte {end}, the file has {present}"
                " bytes now; it changed after it was opened; restore it and resume"
            )
    culprit = getattr(error, "filename", None)
    ref, start, nbytes, _ = next((r for r in requests if str(r[0].file) == culprit), requests[0])
    return ReadError(
        f"{ref.file}: tensor {shown(ref.name)}: reading {nbytes} bytes at byte"
        f" {ref.offset + start} failed: {error}"
    )


def _file_nbytes(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None
