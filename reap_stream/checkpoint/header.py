"""The header of a safetensors file: parse and check it, or render it; no tensor byte is touched.

    ┌────────────────────┬────────────────────────────┬──────────────────────────────┐
    │ n: uint64, little  │ n bytes of JSON, padded    │ data: tensors end to end     │
    │ endian             │ with spaces                │                              │
    └────────────────────┴────────────────────────────┴──────────────────────────────┘
    0                    8                            8 + n = data_start      end of file

The JSON maps each name to ``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets counted
from data_start, and may hold ``"__metadata__"``, strings to strings. Rules: the format section of
https://github.com/huggingface/safetensors. Everything is hostile until checked here, and what has
passed is exact: every byte after the header belongs to one tensor and no file is longer or
shorter than its header says.

Any Unicode string may name a tensor, the empty one and control characters included, as the
safetensors library has it: a name is a key, never a path, and messages escape it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from reap_stream.checkpoint.dtypes import tensor_nbytes
from reap_stream.checkpoint.files import open_regular, pread_exact
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object, shown
from reap_stream.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LENGTH_NBYTES: Final = 8
_METADATA: Final = "__metadata__"
_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True, slots=True)
class Header:
    """What a checked header says.

    Attributes:
        tensors: by name, in the order in which they lie in the file.
        metadata: the ``__metadata__`` strings, empty where there are none.
        data_start: offset of the first data byte, from the start of the file.
    """

    tensors: dict[str, TensorRef]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises:
        CheckpointError: the file cannot be opened or is not a regular file, or what
            `parse_header` raises.
    """
    raw, file_nbytes = read_header_bytes(path)
    return parse_header(raw, path, file_nbytes)


def read_header_bytes(path: Path) -> tuple[bytes, int]:
    """Return the header's bytes, length prefix included, and the length of the whole file.

    Nothing longer than the accepted maximum is ever allocated, whatever the prefix says.

    Raises:
        CheckpointError: not a regular file, unreadable, or a length prefix that cannot be true.
    """
    with open_regular(path) as (fd, file_nbytes):
        prefix = pread_exact(fd, min(_LENGTH_NBYTES, file_nbytes), 0, path)
        json_nbytes = _json_nbytes(prefix, path, file_nbytes)
        return prefix + pread_exact(fd, json_nbytes, _LENGTH_NBYTES, path), file_nbytes


def header_nbytes(raw: bytes, file: Path, file_nbytes: int) -> int:
    """How long a file's header is, length prefix included, from its first bytes.

    Raises:
        CheckpointError: fewer than 8 bytes, or a length prefix that cannot be true.
    """
    return _LENGTH_NBYTES + _json_nbytes(raw, file, file_nbytes)


def parse_header(raw: bytes, file: Path, file_nbytes: int) -> Header:
    """Check a header against every rule of the format and return what it says.

    Args:
        raw: first bytes of the file: the length prefix and all of the JSON, as `render_header`
            returns them; bytes after these are ignored.
        file: the shard, for the refs and for messages.
        file_nbytes: length of the whole file.

    Raises:
        CheckpointError: on the first rule broken, with file, tensor and both numbers.
    """
    json_nbytes = _json_nbytes(raw, file, file_nbytes)
    data_start = _LENGTH_NBYTES + json_nbytes
    if len(raw) < data_start:
        raise CheckpointError(
            f"{file}: header needs {data_start} bytes, {len(raw)} were read; the file is truncated"
        )
    text = raw[_LENGTH_NBYTES:data_start]
    if not text.startswith(b"{"):
        raise CheckpointError(
            f"{file}: header begins with {shown(text[:8])}, not with '{{'; not a safetensors file"
        )
    entries = parse_object(text, file)
    metadata = _checked_metadata(entries.pop(_METADATA, {}), file)
    refs = [_checked_entry(name, entry, file, data_start) for name, entry in entries.items()]
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    _check_layout(refs, file, data_start, file_nbytes)
    return Header({ref.name: ref for ref in refs}, metadata, data_start)


def render_header(
    entries: Sequence[tuple[str, str, tuple[int, ...], int, int]],
    metadata: Mapping[str, str],
) -> bytes:
    """Return the bytes that open a safetensors file: length prefix, JSON, spaces to 8 bytes.

    The result has passed `parse_header`, so no header is written that would not be read.

    Args:
        entries: (name, dtype tag, shape, begin, end) of each tensor, offsets in bytes counted
            from the end of the header.
        metadata: the ``__metadata__`` strings; left out where empty.

    Raises:
        CheckpointError: entries that break a rule of the format.
    """
    where = Path("header to be written")
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for name, dtype, shape, begin, end in entries:
        if name == _METADATA or name in header:
            raise CheckpointError(f"{where}: tensor name {shown(name)} is reserved or used twice")
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except (UnicodeEncodeError, TypeError) as error:
        raise CheckpointError(f"{where}: cannot be written as JSON: {error}") from error
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(_LENGTH_NBYTES, "little") + text
    data_nbytes = max((end for *_, end in entries), default=0)
    parse_header(raw, where, len(raw) + data_nbytes)
    return raw


def _json_nbytes(prefix: bytes, file: Path, file_nbytes: int) -> int:
    if file_nbytes < _LENGTH_NBYTES or len(prefix) < _LENGTH_NBYTES:
        raise CheckpointError(
            f"{file}: {min(file_nbytes, len(prefix))} bytes; a safetensors file has at least"
            f" {_LENGTH_NBYTES}; fetch it again"
        )
    json_nbytes = int.from_bytes(prefix[:_LENGTH_NBYTES], "little")
    if json_nbytes > MAX_JSON_NBYTES:
        raise CheckpointError(
            f"{file}: header of {json_nbytes} bytes; at most {MAX_JSON_NBYTES} are accepted;"
            " probably not a safetensors file"
        )
    if json_nbytes > file_nbytes - _LENGTH_NBYTES:
        raise CheckpointError(
            f"{file}: header of {json_nbytes} bytes in a file of {file_nbytes}; the file is"
            " truncated or not a safetensors file; fetch it again"
        )
    return json_nbytes


def _checked_metadata(value: Any, file: Path) -> dict[str, str]:
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file}: {_METADATA} must map strings to strings, not be {shown(value)}"
        )
    for key, text in value.items():
        if not isinstance(text, str):
            raise CheckpointError(
                f"{file}: {_METADATA} {shown(key)} must be a string, not {shown(text)}"
            )
    return value


def _checked_entry(name: str, entry: Any, file: Path, data_start: int) -> TensorRef:
    where = f"{file}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise CheckpointError(
            f"{where}: must have dtype, shape and data_offsets, nothing else; found {shown(entry)}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise CheckpointError(f"{where}: dtype must be a string, not {shown(dtype)}")
    if not _is_int_list(shape):
        raise CheckpointError(f"{where}: shape must be a list of integers, not {shown(shape)}")
    if not _is_int_list(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets must be two integers, not {shown(offsets)}")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise CheckpointError(f"{where}: data_offsets [{begin}, {end}] do not rise from 0 or more")
    try:
        nbytes = tensor_nbytes(dtype, shape)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {shown(dtype)} {shown(shape)}: {error}") from error
    if nbytes != end - begin:
        raise CheckpointError(
            f"{where}: {dtype} {shown(shape)} needs {nbytes} bytes, data_offsets [{begin}, {end}]"
            f" hold {end - begin}"
        )
    return TensorRef(name, file, dtype, tuple(shape), data_start + begin, nbytes)


def _is_int_list(value: Any) -> bool:
    # `type(...) is int`, since True is an int to isinstance and no dimension to anyone.
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_layout(refs: list[TensorRef], file: Path, data_start: int, file_nbytes: int) -> None:
    """Refuse overlaps and holes, and data that do not end where the file does."""
    position = data_start
    for ref in refs:
        if ref.offset != position:
            fault = "overlaps the tensor before it" if ref.offset < position else "leaves a hole"
            raise CheckpointError(
                f"{file}: tensor {shown(ref.name)} {fault}: it begins at byte {ref.offset},"
                f" the data before it end at byte {position}"
            )
        position += ref.nbytes
    if position != file_nbytes:
        fault, remedy = (
            ("is truncated", "fetch it again")
            if file_nbytes < position
            else ("has trailing bytes", "it was not written by a safetensors writer, or not whole")
        )
        raise CheckpointError(
            f"{file}: {fault}: {file_nbytes} bytes, the header describes {position}; {remedy}"
        )
