"""What a job must keep to where its directory lies on a network file system."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from reap_stream.checkpoint.job import RANKS_NAME, Job, stored_settings
from reap_stream.checkpoint.lock import Lock, check_left
from reap_stream.errors import UsageError
from tests.job_directories import SETTINGS, begin, open_files


@pytest.fixture
def output(tmp_path):
    return tmp_path / "pruned"


def test_nothing_is_open_in_a_directory_that_is_deleted(output, monkeypatch):
    """Network file systems leave a file in its directory as long as somebody has it open."""
    current = begin(output)
    rmdir, seen = Path.rmdir, []

    def watched(path):
        seen.append(path)
        assert open_files(current.directory) == []
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", watched)
    assert open_files(current.directory)
    current.discard()
    assert seen == [current.directory]
    assert not current.directory.exists()


def test_a_job_that_begins_while_another_is_deleted_stays(output, monkeypatch):
    ended = begin(output)
    rmdir, begun = Path.rmdir, []

    def late(path):
        begun.append(begin(output))
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", late)
    ended.discard()
    with begun[0] as current:
        assert stored_settings(output) is not None
        assert current.path("out").is_dir()


def test_files_are_open_as_network_file_systems_want_them_locked(output, monkeypatch):
    """NFS locks by byte ranges: exclusively what is open for writing, for all what is for reading."""
    flock, seen = fcntl.flock, []

    def strict(descriptor, operation):
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == (os.O_RDONLY if operation & fcntl.LOCK_EX else os.O_WRONLY):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        seen.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", strict)
    with begin(output) as current:
        current.path(RANKS_NAME).touch()
        joined = Lock.join(current.path(RANKS_NAME))
        with pytest.raises(UsageError, match="has not ended yet"):
            check_left(current.path(RANKS_NAME))
        joined.release()
    Job.resume(output, SETTINGS).close()
    assert {operation & ~fcntl.LOCK_NB for operation in seen} == {fcntl.LOCK_EX, fcntl.LOCK_SH}
