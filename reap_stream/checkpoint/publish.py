"""The last steps: everything beside the shards, then the whole result into its place.

Until the rename there is no output, or the old one; after it the new one. What a crash leaves:

    crash                           at the output's name    in the job's directory
    before the rename               old, or nothing         out: new, whole
    after an exchange               new                     out: old, known by publish.json
    between two renames (where the  nothing                 old: old, whole; out: new, whole
    system knows no exchange)
    after the last rename           new                     old: old, until it is deleted

`--resume` goes on from each of these; `--overwrite` puts an old output back before it starts anew.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Final

from reap_stream import _native
from reap_stream.checkpoint.atomic import write_atomically
from reap_stream.checkpoint.configedit import SIDE_FILES_NAMING_MODULES, edit_side_file
from reap_stream.checkpoint.disk import output_errors, sync_directory
from reap_stream.checkpoint.files import open_regular, pread_exact
from reap_stream.checkpoint.index import INDEX_NAME
from reap_stream.checkpoint.layout import index_json
from reap_stream.checkpoint.source import CONFIG_NAME
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES
from reap_stream.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from reap_stream.checkpoint.job import Job
    from reap_stream.checkpoint.layout import OutputPlan
    from reap_stream.checkpoint.source import Checkpoint

RECORDS: Final = "reap"
"""Folder of a pruned checkpoint that holds what this package says about it."""

_CHUNK_NBYTES: Final = 1 << 20


def finish_directory(
    directory: Path,
    plan: OutputPlan,
    source: Checkpoint,
    kept: Mapping[int, Sequence[int]],
    config_text: str,
    documents: Mapping[str, bytes],
) -> None:
    """Write everything of a pruned checkpoint beside its shards, the index last.

    Args:
        directory: holds the shards, written and synced.
        plan: what the shards hold.
        source: its side files are copied, save those that `documents` replaces and an earlier
            pruning's records; quantisation files that name experts are renumbered.
        kept: source numbers of the kept experts by layer.
        config_text: the pruned checkpoint's config.json.
        documents: further files by relative path, e.g. ``reap/run.json`` and ``README.md``.

    Raises:
        OutputError: a file could not be written.
        CheckpointError: a side file of the source could not be read.
        UnsupportedError: a quantisation file names experts in a way that cannot be renumbered.
    """
    with output_errors(directory):
        # What an earlier attempt that was killed left half-written.
        for partial in directory.rglob(".*.partial"):
            partial.unlink()
    own = {CONFIG_NAME, INDEX_NAME, *documents, *(shard.filename for shard in plan.shards)}
    for name in carried_files(source, own):
        nbytes = (source.directory / name).stat().st_size
        _write(directory / name, side_file_chunks(source, name, kept), nbytes)
    texts = {CONFIG_NAME: config_text.encode("utf-8"), **documents}
    index = json.dumps(index_json(plan), indent=2, ensure_ascii=False)
    for name, data in {**texts, INDEX_NAME: f"{index}\n".encode()}.items():
        _write(directory / name, [data], len(data))
    with output_errors(directory):
        for folder, _, _ in os.walk(directory):
            sync_directory(directory / folder)


def carried_files(source: Checkpoint, own: set[str]) -> list[str]:
    """The source's side files that go along: not those in `own`, not an earlier pruning's records."""
    return [
        name for name in source.side_files if name not in own and not name.startswith(f"{RECORDS}/")
    ]


def side_file_chunks(
    source: Checkpoint, name: str, kept: Mapping[int, Sequence[int]]
) -> Iterator[bytes]:
    """What a side file of the pruned checkpoint holds, in chunks.

    Raises:
        CheckpointError: the source's file could not be read.
        UnsupportedError: it names experts in a way that cannot be renumbered.
    """
    path = source.directory / name
    with open_regular(path) as (descriptor, nbytes):
        if name in SIDE_FILES_NAMING_MODULES and nbytes <= MAX_JSON_NBYTES:
            raw = pread_exact(descriptor, nbytes, 0, path)
            yield edit_side_file(raw, path, source.config, kept, source.tensors)
            return
        for begin in range(0, nbytes, _CHUNK_NBYTES):
            yield pread_exact(descriptor, min(_CHUNK_NBYTES, nbytes - begin), begin, path)


def publish(job: Job, *, overwrite: bool = False) -> None:
    """Put a finished job's ``out`` in the output's place; an old output stays whole until then.

    May be called again after a crash at any point. `Job.discard` is left to the caller.

    Raises:
        OutputError: an output appeared meanwhile and `overwrite` is not set, or the system refused
            a step; either the old or the new output is whole and in place.
    """
    output, old = job.output, job.path("old")
    if not job.is_published:
        if not overwrite and output.exists() and not is_empty_directory(output):
            raise OutputError(
                f"{output}: appeared while the job ran; move it away, then go on with --resume"
            )
        _swap_in(job)
    with output_errors(output):
        if job.path("out").exists():
            # An exchange put the old output there. Away from that name before the long deletion,
            # since the job's own result bore it.
            remove(old)
            job.path("out").rename(old)
        sync_directory(output.parent)
        remove(old)


def is_published(directory: Path, output: Path) -> bool:
    """Whether the job in `directory` has put its result in the output's place."""
    record = directory / "publish.json"
    if not record.is_file():
        return False
    if not (directory / "out").exists():
        return True
    # After an exchange `out` is the old output, of the same layout perhaps: only the directory's
    # own number tells which of the two the job wrote.
    return output.exists() and json.loads(record.read_bytes())["inode"] == output.stat().st_ino


def restore(directory: Path, output: Path) -> None:
    """Undo the first of two renames if the second never came; an OSError is the caller's."""
    if (directory / "old").exists() and not output.exists():
        (directory / "old").rename(output)
        sync_directory(output.parent)


def is_empty_directory(path: Path) -> bool:
    """Whether a path is a directory with nothing in it, which a rename may replace."""
    return path.is_dir() and next(path.iterdir(), None) is None


def remove(path: Path) -> None:
    """Delete a file or a tree, if it is there; an OSError is the caller's to translate."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _swap_in(job: Job) -> None:
    new, output, old = job.path("out"), job.output, job.path("old")
    with output_errors(output):
        sync_directory(new)
        record = json.dumps({"inode": new.stat().st_ino}).encode()
        write_atomically(job.path("publish.json"), [record], len(record))
        if not output.exists() or is_empty_directory(output):
            new.rename(output)
        elif not _native.exchange(str(new), str(output)):
            try:
                output.rename(old)
                new.rename(output)
            except OSError:
                restore(job.directory, output)
                raise


def _write(path: Path, chunks: Iterable[bytes], nbytes: int) -> None:
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, chunks, nbytes)
