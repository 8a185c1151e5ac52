"""`reap/SHA256SUMS`: hashes of a checkpoint's files in the form that `sha256sum -c` reads.

README.md is not among them: people edit it. The file's own hash cannot be.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from reap_stream.card.facts import CARD_NAME
from reap_stream.card.usage import CHECKSUMS_FILE
from reap_stream.checkpoint.atomic import write_atomically
from reap_stream.checkpoint.files import open_regular, pread_exact, read_small
from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES
from reap_stream.errors import CheckpointError, VerificationError
from reap_stream.upload.files import LocalFile, local_files

_CHUNK_NBYTES: Final = 1 << 22
# Hashing lets other threads run; more would only make the disk seek.
_AT_A_TIME: Final = 4
_LINE: Final = re.compile(r"(?P<escaped>\\?)(?P<sha256>[0-9a-f]{64}) [ *](?P<name>.+)")
_UNLISTED: Final = frozenset({CARD_NAME, CHECKSUMS_FILE})


def hash_files(
    files: Sequence[LocalFile], progress: Callable[[int], object] = lambda _: None
) -> dict[str, str]:
    """SHA-256 of files by name, in hexadecimal.

    Args:
        files: read whole, several at a time.
        progress: called with the bytes of each piece that was read.

    Raises:
        CheckpointError: a file cannot be read, or has changed its length.
    """
    with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="reap-hash") as pool:
        hashes = pool.map(lambda file: _sha256(file, progress), files)
        return {file.name: found for file, found in zip(files, hashes, strict=True)}


def read_checksums(directory: Path) -> dict[str, str]:
    """The hashes on record by name; empty where there is no record.

    Raises:
        CheckpointError: the record is malformed.
    """
    path = directory / CHECKSUMS_FILE
    if not path.exists():
        return {}
    found: dict[str, str] = {}
    lines = read_small(path, MAX_JSON_NBYTES).decode("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is not None:
            name = _unescaped(match["name"]) if match["escaped"] else match["name"]
            found[name] = match["sha256"]
        elif line:
            raise CheckpointError(
                f"{path}: line {number} is no line of sha256sum; delete the file to have it made anew"
            )
    return found


def check_hashes(directory: Path, recorded: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Hold files against their record.

    Raises:
        VerificationError: one is missing or another than when the record was made.
    """
    missing = [name for name in recorded if name not in found]
    altered = [name for name in recorded if name in found and found[name] != recorded[name]]
    if missing or altered:
        lines = "".join(f"\n  {name}: missing" for name in missing)
        lines += "".join(f"\n  {name}: other bytes than on record" for name in altered)
        raise VerificationError(
            f"{directory}: is not as {CHECKSUMS_FILE} says. If you changed it on purpose, delete that"
            f" file; else prune again or restore these{lines}"
        )


def write_checksums(directory: Path, hashes: Mapping[str, str]) -> None:
    """Write the record.

    Raises:
        OutputError: it could not be written.
    """
    lines = (_line(name, hashes[name]) for name in sorted(hashes) if name not in _UNLISTED)
    data = "".join(lines).encode()
    write_atomically(directory / CHECKSUMS_FILE, [data], len(data))


def record_checksums(directory: Path) -> Path:
    """Make the record of a checkpoint anew, from its files as they are.

    Returns:
        The record.

    Raises:
        ReapStreamError: the directory is no checkpoint, or holds weights that are not its own.
    """
    write_checksums(directory, hash_files(local_files(open_checkpoint(directory))))
    return directory / CHECKSUMS_FILE


def refresh_checksums(directory: Path, names: Iterable[str]) -> None:
    """Bring the record, where there is one, up to date with files that were just written."""
    recorded = read_checksums(directory)
    if not recorded:
        return
    paths = [(name, directory / name) for name in names]
    files = [LocalFile(name, path, path.stat().st_size) for name, path in paths]
    write_checksums(directory, {**recorded, **hash_files(files)})


def _sha256(file: LocalFile, progress: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with open_regular(file.path) as (descriptor, nbytes):
        if nbytes != file.nbytes:
            raise CheckpointError(
                f"{file.path}: has changed its length meanwhile: something writes it"
            )
        for begin in range(0, nbytes, _CHUNK_NBYTES):
            part = pread_exact(descriptor, min(_CHUNK_NBYTES, nbytes - begin), begin, file.path)
            digest.update(part)
            progress(len(part))
    return digest.hexdigest()


def _line(name: str, sha256: str) -> str:
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{sha256}  {escaped}\n"


def _unescaped(name: str) -> str:
    meant = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}
    return re.sub(r"\\[\\nr]", lambda match: meant[match[0]], name)
