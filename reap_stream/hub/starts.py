"""Headers of shards by range requests: kilobytes of each file, so that a plan costs no download."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from reap_stream.checkpoint.header import header_nbytes
from reap_stream.checkpoint.providers import Origin, ShardStart
from reap_stream.errors import CheckpointError
from reap_stream.hub.errors import explained
from reap_stream.hub.retrying import persist

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from reap_stream.hub.listing import RemoteFile

# Most headers are shorter; a longer one takes a second request.
_FIRST_NBYTES: Final = 100_000
_AT_A_TIME: Final = 8
_WHOLE_FILE: Final = 200
_PASSING: Final = (408, 429, 500, 502, 503, 504)


def fetch_starts(origin: Origin, directory: Path, files: Sequence[RemoteFile]) -> list[ShardStart]:
    """The headers of shards, several at a time, in the order given.

    Args:
        origin: the repository.
        directory: what its files are called by in messages.
        files: the shards.

    Raises:
        CheckpointError: one cannot be had, or is no safetensors file.
    """
    with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="reap-headers") as pool:
        return list(pool.map(lambda file: _fetch_start(origin, directory, file), files))


def _fetch_start(origin: Origin, directory: Path, file: RemoteFile) -> ShardStart:
    raw = _fetch_range(origin, file, 0, min(_FIRST_NBYTES, file.nbytes))
    needed = header_nbytes(raw, directory / file.name, file.nbytes)
    if len(raw) < needed:
        raw += _fetch_range(origin, file, len(raw), needed)
    return ShardStart(raw[:needed], file.nbytes, file.identity)


def _fetch_range(origin: Origin, file: RemoteFile, begin: int, end: int) -> bytes:
    """Bytes `begin` to `end` of a file."""
    with explained(origin.repository, f"fetching the header of {file.name}"):
        return persist(lambda: _request(origin, file, begin, end))


def _request(origin: Origin, file: RemoteFile, begin: int, end: int) -> bytes:
    url = hf_hub_url(origin.repository, file.name, revision=origin.revision)
    headers = {
        **build_hf_headers(library_name="reap-stream"),
        "Range": f"bytes={begin}-{end - 1}",
        "Accept-Encoding": "identity",
    }
    found = bytearray()
    # What breaks in the body is tried again by the caller, as the library cannot.
    answered = http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),
        retry_on_status_codes=_PASSING,
    )
    with answered as response:
        hf_raise_for_status(response)
        _check_total(response.headers.get("Content-Range"), origin, file)
        # A server that ignores the range sends everything: what lies before it is passed over, and
        # what lies behind is not waited for.
        wanted = end - begin
        first = begin if response.status_code == _WHOLE_FILE else 0
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= first + wanted:
                break
    if len(found) < first + wanted:
        raise CheckpointError(
            f"{origin.repository}: {file.name}: {len(found)} bytes came, {wanted} were asked for;"
            " try again"
        )
    return bytes(found[first : first + wanted])


def _check_total(content_range: str | None, origin: Origin, file: RemoteFile) -> None:
    total = (content_range or "").rpartition("/")[2]
    if total.isdigit() and int(total) != file.nbytes:
        raise CheckpointError(
            f"{origin.repository}: {file.name}: is {total} bytes long as it is sent, the repository"
            f" lists {file.nbytes}; the Hub's copy is damaged: report it to the model's owner"
        )
