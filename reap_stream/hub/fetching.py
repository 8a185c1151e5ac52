"""The rest of a file by HTTP, appended to what is on the disk; a stop is seen at the next bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, cast

from huggingface_hub import hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily

from reap_stream.checkpoint.providers import Origin
from reap_stream.errors import ReadError
from reap_stream.hub.listing import RemoteFile
from reap_stream.hub.retrying import persist

LIBRARY: Final = "reap-stream"
# Networks that deliver files end an answer at some length (50 GB), and the library asks for no more.
_SLICE_NBYTES: Final = 20 * 10**9


def complete(
    partial: Path, file: RemoteFile, origin: Origin, stopped: Callable[[], bool]
) -> None:  # fmt: skip
    """Fetches what a file lacks, on from where an earlier attempt stopped.

    Args:
        partial: what there is of it, if anything.
        file: as listed.
        origin: the repository.
        stopped: tells whether to break off.

    Raises:
        ReadError: it was broken off.
        Exception: whatever huggingface_hub raises.
    """

    def attempt() -> None:
        with partial.open("ab") as stream:
            if stream.tell() > file.nbytes:
                stream.truncate(0)
                stream.seek(0)
            _append(_Stoppable(stream, stopped), file, origin)

    def progress() -> int:
        return partial.stat().st_size if partial.exists() else 0

    persist(attempt, progress)


def _append(stream: _Stoppable, file: RemoteFile, origin: Origin) -> None:
    if file.nbytes <= _SLICE_NBYTES:
        _get(stream, file, origin, resume_size=stream.tell(), expected_size=file.nbytes)
        return
    while (begin := stream.tell()) < file.nbytes:
        end = min(begin + _SLICE_NBYTES, file.nbytes)
        with stream.ending_at(end):
            asked = {"Range": f"bytes={begin}-{end - 1}"}
            _get(stream, file, origin, headers=asked, expected_size=end - begin)


def _get(
    stream: _Stoppable,
    file: RemoteFile,
    origin: Origin,
    *,
    headers: dict[str, str] | None = None,
    expected_size: int,
    resume_size: int = 0,
) -> None:
    # By this name and not as Xet chunks, which would begin anew after every interruption.
    http_get(
        hf_hub_url(origin.repository, file.name, revision=origin.revision),
        cast("BinaryIO", stream),
        resume_size=resume_size,
        headers={
            **build_hf_headers(library_name=LIBRARY),
            "Accept-Encoding": "identity",
            **(headers or {}),
        },
        expected_size=expected_size,
        displayed_filename=file.name,
    )


class _Stoppable:
    """A file that takes no more bytes once it is told to stop, nor any behind an end."""

    def __init__(self, stream: BinaryIO, stopped: Callable[[], bool]) -> None:
        self._stream = stream
        self._stopped = stopped
        self._end: int | None = None
        self.tell = stream.tell
        self.seek = stream.seek
        self.truncate = stream.truncate

    @contextmanager
    def ending_at(self, end: int) -> Iterator[None]:
        """Takes nothing behind a place, for the length of a block."""
        self._end = end
        try:
            yield
        finally:
            self._end = None

    def write(self, data: bytes) -> int:
        if self._stopped():
            raise ReadError("the transfer was broken off, since the command ended")
        if self._end is not None and self.tell() + len(data) > self._end:
            raise ReadError("the server sends whole files where parts are asked for")
        return self._stream.write(data)
