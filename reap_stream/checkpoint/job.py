"""A job on its way: one hidden directory beside the output holds all that `--resume` needs.

    .NAME.reap-job/
        lock            held while a process works on the job; its holder's process id inside
        ranks           held by its further ranks, where it has several
        job.json        settings, fingerprint of the source included; there once the job exists
        journal.jsonl   one line a finished layer, on the disk before the next layer begins
        layers/         scores, a file a layer
        hidden/         activations that did not fit in memory
        out/            the checkpoint being written (with several targets: out/keep-N/)
        publish.json    written when `out` is about to take the output's place
        old             the output that was replaced, until it is deleted

The job lies beside the output, not in it: both are on one disk, so what is finished takes its place
by a rename, and until then there is no output that could be mistaken for a whole one.
"""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from reap_stream.checkpoint.atomic import write_atomically
from reap_stream.checkpoint.disk import output_errors, remove_if_empty
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.journal import Journal
from reap_stream.checkpoint.lock import Lock, check_left
from reap_stream.checkpoint.publish import is_empty_directory, is_published, remove, restore
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object, shown
from reap_stream.errors import CheckpointError, ResumeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from typing_extensions import Self

RANKS_NAME: Final = "ranks"
_HASH: Final = re.compile(r"'[0-9a-f]{64}'")
_FOLDERS: Final = ("layers", "hidden", "out")


def check_output_path(output: Path, source: Path) -> None:
    """Refuse an output that would touch its own source.

    Raises:
        UsageError: one of the two is the other, or lies in it, links followed.
    """
    target, origin = output.resolve(), source.resolve()
    if target == origin:
        raise UsageError(f"{output}: is the source itself; choose another --output")
    if target.is_relative_to(origin):
        raise UsageError(f"{output}: lies inside the source {source}; choose another --output")
    if origin.is_relative_to(target):
        raise UsageError(f"{output}: holds the source {source}; choose another --output")


def stored_settings(output: Path) -> dict[str, Any] | None:
    """The settings that a half-done job was begun with, as JSON has them; None without such a job.

    For settings that a new run chooses by itself and a resumed one must keep.

    Raises:
        ResumeError: they cannot be read.
    """
    path = job_directory(output.resolve()) / "job.json"
    if not path.is_file():
        return None
    return {key: value for key, value in _read_record(path).items() if key != "version"}


def check_new_job(output: Path, *, overwrite: bool) -> None:
    """Refuse early what `Job.create` would refuse.

    Raises:
        UsageError: there is an output or a half-done job and `overwrite` is not set, or the output
            could not be renamed into place.
    """
    output = output.resolve()
    _check_replaceable(output, overwrite=overwrite)
    directory = job_directory(output)
    if (directory / "job.json").exists() and not overwrite:
        raise UsageError(
            f"{directory}: a half-done job for this output: "
            "--resume to go on, --overwrite to start anew"
        )


class Job:
    """A job directory, locked. Use `create` or `resume`; a context manager that lets go the lock."""

    def __init__(self, output: Path, lock: Lock) -> None:
        """Take over a directory that is locked already."""
        self.output = output
        self.directory = job_directory(output)
        self._lock = lock
        self._journal = Journal(self.directory / "journal.jsonl")

    @classmethod
    def create(cls, output: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> Job:
        """Begin a job.

        Args:
            output: where the result will lie; missing parents are made.
            settings: JSON scalars and lists that decide the result, the source's fingerprint among
                them; compared on resume.
            overwrite: replace an existing output when the job is done, and throw away a half-done
                job now.

        Raises:
            UsageError: there is an output or a half-done job and `overwrite` is not set; another
                process works on the job; the output could not be renamed into place.
            OutputError: the directory could not be made.
        """
        output = output.resolve()
        _check_replaceable(output, overwrite=overwrite)
        directory = job_directory(output)
        with output_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        lock = Lock.acquire(directory / "lock")
        with lock.released_on_error():
            check_left(directory / RANKS_NAME)
            check_new_job(output, overwrite=overwrite)
            with output_errors(directory):
                _clear(directory, output)
                for name in _FOLDERS:
                    (directory / name).mkdir()
            job = cls(output, lock)
            _write_record(directory / "job.json", settings)
        return job

    @classmethod
    def resume(
        cls, output: Path, settings: Mapping[str, Any], free_keys: frozenset[str] = frozenset()
    ) -> Job:
        """Go on with a half-done job.

        Args:
            output: as given to `create`.
            settings: those of this command.
            free_keys: settings that may differ from those the job was begun with (memory, threads).

        Raises:
            ResumeError: there is no such job, its files are damaged, or its settings differ.
            UsageError: another process works on it.
        """
        output = output.resolve()
        directory = job_directory(output)
        if not (directory / "job.json").is_file():
            raise ResumeError(f"{output}: no half-done job to resume; leave out --resume")
        lock = Lock.acquire(directory / "lock")
        with lock.released_on_error():
            check_left(directory / RANKS_NAME)
            _check_settings(directory / "job.json", settings, free_keys)
            job = cls(output, lock)
            if job.is_published and not output.exists():
                raise ResumeError(
                    f"{output}: the job was finished and its output moved away; "
                    "--overwrite to start anew"
                )
        return job

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The journal's lines, oldest first."""
        return list(self._journal.entries)

    @property
    def is_published(self) -> bool:
        """Whether the result is in its place and only `discard` is left to do."""
        return is_published(self.directory, self.output)

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line to the journal; it is on the disk when this returns.

        Raises:
            OutputError: it could not be written; the journal is as before.
        """
        self._journal.append(entry)

    def path(self, *parts: str) -> Path:
        """A path inside the job's directory, e.g. ``path("out", "keep-96")``."""
        return self.directory.joinpath(*parts)

    def discard(self) -> None:
        """Delete the job's directory and let go the lock.

        Raises:
            OutputError: something in it could not be deleted.
        """
        with output_errors(self.directory):
            _clear(self.directory, self.output)
            self._lock.discard(self.directory / "lock")
            remove_if_empty(self.directory)

    def close(self) -> None:
        """Let go the lock; the job stays and can be resumed."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def job_directory(output: Path) -> Path:
    """The directory of an output's job; `output` without links."""
    return output.parent / f".{output.name}.reap-job"


def _check_replaceable(output: Path, *, overwrite: bool) -> None:
    """Find out now, not after hours, that the result could not be renamed into place."""
    if not output.exists():
        return
    if os.path.ismount(output):
        raise UsageError(f"{output}: is a mount point; name a directory inside it as --output")
    if any(folder.is_relative_to(output) for folder in (Path.cwd(), Path.home().resolve())):
        raise UsageError(
            f"{output}: is or holds the working or home directory, and the output is replaced as a "
            "whole; name a directory inside it as --output"
        )
    if not overwrite and not is_empty_directory(output):
        raise UsageError(f"{output}: exists already; --overwrite to replace it")


def _clear(directory: Path, output: Path) -> None:
    """Empty a job's directory, all but the lock; an old output not replaced yet goes back."""
    restore(directory, output)
    # First, so that a directory half emptied is not taken for a half-done job.
    remove(directory / "job.json")
    for path in directory.iterdir():
        if path.name != "lock":
            remove(path)


def _write_record(path: Path, settings: Mapping[str, Any]) -> None:
    record = json.dumps({"version": _version(), "settings": settings}, indent=2).encode()
    write_atomically(path, [record], len(record))


def _version() -> str:
    try:
        return version("reap-stream")
    except PackageNotFoundError:
        return "unknown"


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = parse_object(read_small(path, MAX_JSON_NBYTES), path)
        return {**record["settings"], "version": record["version"]}
    except (CheckpointError, KeyError, TypeError) as error:
        raise ResumeError(f"{path}: damaged: {error}; start anew with --overwrite") from error


def _check_settings(path: Path, settings: Mapping[str, Any], free_keys: frozenset[str]) -> None:
    before = _read_record(path)
    # Through JSON, so that a tuple equals the list it was stored as.
    now = {**json.loads(json.dumps(settings)), "version": _version()}
    changed = [
        f"{key} was {_shown(before, key)}, is {_shown(now, key)}"
        for key in sorted((before.keys() | now.keys()) - free_keys)
        if key not in before or key not in now or before[key] != now[key]
    ]
    if changed:
        raise ResumeError(
            f"{path.parent}: the half-done job has other settings: {'; '.join(changed)}; "
            "give the same ones to go on, or --overwrite to start anew"
        )


def _shown(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return "not set"
    text = shown(settings[key])
    # The beginning of a hash tells it from another.
    return f"{text[:13]}…'" if _HASH.fullmatch(text) else text
