from __future__ import annotations

import os
from pathlib import Path

import pytest

from reap_stream import _native
from reap_stream.checkpoint import disk
from reap_stream.checkpoint import publish as module
from reap_stream.checkpoint.job import Job
from reap_stream.checkpoint.publish import publish
from reap_stream.errors import OutputError, ResumeError
from tests.job_directories import SETTINGS, begin, fill, whole


@pytest.fixture
def output(tmp_path):
    return tmp_path / "deep" / "pruned"


class KilledError(BaseException):
    """Ends the process as far as `except OSError` and `except Exception` can tell."""


STEPS = ("write_record", "exchange", "rename", "sync", "remove")


def break_step(patch, step: str, number: int, error: BaseException, *, after: bool) -> None:
    """Make the `number`-th call of a step of publishing fail, before or after it took effect."""
    owner, name = {
        "write_record": (module, "write_atomically"),
        "exchange": (_native, "exchange"),
        "rename": (Path, "rename"),
        "sync": (module, "sync_directory"),
        "remove": (module.shutil, "rmtree"),
    }[step]
    real, calls = getattr(owner, name), 0

    def broken(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls != number:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise error

    patch.setattr(owner, name, broken)


@pytest.mark.parametrize("exchanging", [True, False])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("error", [KilledError(), OSError(5, "Input/output error")])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("number", [1, 2])
def test_a_fault_at_any_step_loses_neither_output(
    output, monkeypatch, exchanging, after, error, step, number
):
    fill(output, "old")
    current = begin(output, overwrite=True)
    fill(current.path("out"), "new")
    with monkeypatch.context() as patch:
        if not exchanging:
            patch.setattr(_native, "exchange", lambda *_: False)
        break_step(patch, step, number, error, after=after)
        failed = False
        try:
            publish(current, overwrite=True)
        except (KilledError, OutputError):
            failed = True
        places = {whole(output), *map(whole_or_none, map(current.path, ("old", "out")))}
        assert "new" in places
        if failed and not isinstance(error, KilledError):
            assert whole(output) is not None
        assert whole(output) == "new" or "old" in places
    current.close()
    with Job.resume(output, SETTINGS) as again:
        publish(again, overwrite=True)
        assert whole(output) == "new"
        again.discard()
    assert whole(output) == "new"
    assert [path.name for path in output.parent.iterdir()] == ["pruned"]


def whole_or_none(path: Path) -> str | None:
    """As `whole`, but a tree half deleted counts as nothing."""
    try:
        return whole(path)
    except (AssertionError, FileNotFoundError):
        return None


def test_starting_anew_puts_back_an_old_output_half_replaced(output, monkeypatch):
    fill(output, "old")
    current = begin(output, overwrite=True)
    fill(current.path("out"), "new")
    with monkeypatch.context() as patch:
        patch.setattr(_native, "exchange", lambda *_: False)
        break_step(patch, "rename", 2, KilledError(), after=False)
        # `Path.replace` writes the record, so the second rename is the one into place.
        with pytest.raises(KilledError):
            publish(current, overwrite=True)
    assert not output.exists()
    current.close()
    begin(output, overwrite=True).discard()
    assert whole(output) == "old"


def test_an_exchange_of_equal_layouts_is_not_undone_by_resuming(output, monkeypatch):
    fill(output, "old")
    current = begin(output, overwrite=True)
    fill(current.path("out"), "new")
    with monkeypatch.context() as patch:
        break_step(patch, "exchange", 1, KilledError(), after=True)
        with pytest.raises(KilledError):
            publish(current, overwrite=True)
    assert whole(output) == "new"
    assert whole(current.path("out")) == "old"
    assert current.is_published
    current.close()
    with Job.resume(output, SETTINGS) as again:
        publish(again, overwrite=True)
        again.discard()
    assert whole(output) == "new"


def test_an_output_that_appears_meanwhile_is_not_replaced(output):
    with begin(output) as current:
        fill(current.path("out"), "new")
        fill(output, "someone else's")
        with pytest.raises(OutputError, match="appeared while the job ran"):
            publish(current)
        assert whole(output) == "someone else's"
        assert whole(current.path("out")) == "new"


def test_a_finished_job_whose_output_was_moved_away_is_not_resumed(output):
    with begin(output) as current:
        fill(current.path("out"), "new")
        publish(current)
    with Job.resume(output, SETTINGS) as again:
        assert again.is_published
    output.rename(output.with_name("elsewhere"))
    with pytest.raises(ResumeError, match="its output moved away"):
        Job.resume(output, SETTINGS)


def test_publishing_without_an_output_renames(output):
    with begin(output) as current:
        fill(current.path("out"), "new")
        publish(current)
        current.discard()
    assert whole(output) == "new"
    assert list(output.parent.iterdir()) == [output]


def test_a_file_can_be_replaced_too(output):
    output.parent.mkdir()
    output.write_text("old")
    with begin(output, overwrite=True) as current:
        fill(current.path("out"), "new")
        publish(current, overwrite=True)
        current.discard()
    assert whole(output) == "new"


def test_a_directory_that_cannot_be_synced_is_let_pass_where_systems_say_so(tmp_path, monkeypatch):
    def refuse(number):
        def fsync(descriptor):
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(disk.os, "fsync", refuse(22))
    disk.sync_directory(tmp_path)
    monkeypatch.setattr(disk.os, "fsync", refuse(5))
    with pytest.raises(OSError, match="Input/output error"):
        disk.sync_directory(tmp_path)
