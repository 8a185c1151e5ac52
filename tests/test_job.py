from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from reap_stream.checkpoint import job, journal
from reap_stream.checkpoint.job import Job, check_output_path, stored_settings
from reap_stream.checkpoint.publish import publish
from reap_stream.errors import OutputError, ResumeError, UsageError
from tests.job_directories import SETTINGS, begin, fill, whole


@pytest.fixture
def output(tmp_path):
    return tmp_path / "deep" / "pruned"


# ---- beginning, going on, ending


def test_a_job_is_resumed_with_its_entries(output):
    with begin(output) as first:
        first.append({"layer": 3, "kept": [0, 2]})
        first.append({"layer": 4, "kept": [1, 2]})
        first.path("out", "file").write_text("half")
    with Job.resume(output, SETTINGS) as second:
        assert second.entries == [{"layer": 3, "kept": [0, 2]}, {"layer": 4, "kept": [1, 2]}]
        assert second.path("out", "file").read_text() == "half"
        assert not second.is_published
        assert not output.exists()


def test_a_job_lies_beside_its_output_and_leaves_nothing(output):
    with begin(output) as current:
        assert current.directory == output.parent / ".pruned.reap-job"
        assert all(current.path(name).is_dir() for name in ("layers", "out", "hidden"))
        current.discard()
    assert list(output.parent.iterdir()) == []


def test_settings_are_compared_as_json(output):
    Job.create(output, {"keep": (3, 4)}).close()
    Job.resume(output, {"keep": [3, 4]}).close()


def test_changed_settings_are_refused_by_name(output, monkeypatch):
    begin(output).close()
    changed = {"keep": [2], "memory": "8GiB", "source": "abd", "new": 1}
    with pytest.raises(ResumeError) as caught:
        Job.resume(output, changed, frozenset({"memory"}))
    for part in (
        "keep was [3], is [2]",
        "source was 'abc', is 'abd'",
        "seed was 0, is not set",
        "new was not set, is 1",
        "--overwrite",
    ):
        assert part in str(caught.value)
    assert "memory" not in str(caught.value)
    Job.resume(output, {**SETTINGS, "memory": "8GiB"}, frozenset({"memory"})).close()
    monkeypatch.setattr(job, "_version", lambda: "9.9")
    with pytest.raises(ResumeError, match=r"version was '.*', is '9\.9'"):
        Job.resume(output, SETTINGS)


def test_long_settings_are_compared_to_their_end(output):
    Job.create(output, {"spec": "x" * 500 + "a"}).close()
    with pytest.raises(ResumeError, match="spec was"):
        Job.resume(output, {"spec": "x" * 500 + "b"})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 1}', '{"settings": 3, "version": 1}']
)
def test_a_damaged_record_is_refused(output, text):
    with begin(output) as current:
        current.path("job.json").write_text(text)
    with pytest.raises(ResumeError, match=r"job\.json: damaged.*--overwrite"):
        Job.resume(output, SETTINGS)


def test_stored_settings_are_those_of_the_half_done_job(output):
    assert stored_settings(output) is None
    with Job.create(output, {"batch": 8, "keep": (3,)}) as current:
        assert stored_settings(output) == {"batch": 8, "keep": [3]}
        current.path("job.json").write_text("{")
        with pytest.raises(ResumeError, match="damaged"):
            stored_settings(output)
        current.discard()
    assert stored_settings(output) is None


def test_resume_needs_a_job(output):
    with pytest.raises(ResumeError, match="no half-done job"):
        Job.resume(output, SETTINGS)


def test_a_directory_without_a_record_is_no_job(output):
    (output.parent / ".pruned.reap-job" / "out").mkdir(parents=True)
    with pytest.raises(ResumeError, match="no half-done job"):
        Job.resume(output, SETTINGS)
    begin(output).discard()


def test_a_half_done_job_is_not_thrown_away_unasked(output):
    with begin(output) as first:
        first.append({"layer": 3})
        first.path("out", "file").write_text("half")
    with pytest.raises(UsageError, match=r"--resume to go on, --overwrite to start anew"):
        begin(output)
    with Job.resume(output, SETTINGS) as same:
        assert len(same.entries) == 1
    with begin(output, overwrite=True) as anew:
        assert anew.entries == []
        assert list(anew.path("out").iterdir()) == []


def test_an_existing_output_is_not_replaced_unasked(output):
    fill(output, "old")
    with pytest.raises(UsageError, match="exists already; --overwrite"):
        begin(output)
    begin(output, overwrite=True).discard()
    assert whole(output) == "old"


def test_an_empty_output_directory_may_be_there(output):
    output.mkdir(parents=True)
    with begin(output) as current:
        fill(current.path("out"), "new")
        publish(current)
        current.discard()
    assert whole(output) == "new"


def test_outputs_that_no_rename_can_replace_are_refused(output, monkeypatch):
    with pytest.raises(UsageError, match="mount point"):
        begin(Path("/proc"), overwrite=True)
    fill(output, "old")
    monkeypatch.chdir(output / "sub")
    with pytest.raises(UsageError, match="working or home directory"):
        begin(output, overwrite=True)
    with pytest.raises(UsageError, match="working or home directory"):
        begin(Path.home(), overwrite=True)


def test_an_output_may_not_touch_its_source(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "up").symlink_to(tmp_path)
    for name, match in {
        "source": "is the source itself",
        "link": "is the source itself",
        "source/sub": "lies inside the source",
        "link/sub/sub": "lies inside the source",
        "up": "holds the source",
        ".": "holds the source",
    }.items():
        with pytest.raises(UsageError, match=match):
            check_output_path(tmp_path / name, source)
    check_output_path(tmp_path / "source-pruned", source)


# ---- two processes


def test_two_jobs_never_share_a_directory(output):
    with begin(output) as first:
        for again in (
            lambda: begin(output),
            lambda: begin(output, overwrite=True),
            lambda: Job.resume(output, SETTINGS),
        ):
            with pytest.raises(UsageError, match=rf"process {os.getpid()} on \S+ is working"):
                again()
        assert first.path("job.json").exists()
    Job.resume(output, SETTINGS).close()


def run_until_killed(output: Path, body: str) -> None:
    """Run a body with a new `job` in a process of its own, which kills itself."""
    program = f"""
        import os, signal, sys
        from pathlib import Path
        from reap_stream.checkpoint.job import Job
        job = Job.create(Path(sys.argv[1]), {SETTINGS!r})
        {body}
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(output)], check=False
    )
    assert done.returncode == -signal.SIGKILL


def test_a_killed_job_goes_on_where_it_was(output):
    run_until_killed(output, 'job.append({"layer": 1}); job.append({"layer": 2})')
    with Job.resume(output, SETTINGS) as current:
        assert current.entries == [{"layer": 1}, {"layer": 2}]
        current.append({"layer": 3})
    with Job.resume(output, SETTINGS) as current:
        assert [entry["layer"] for entry in current.entries] == [1, 2, 3]


# ---- the journal


@pytest.mark.parametrize(
    "torn", [b'{"layer": 2, "ke', b'{"layer": 2}', b"\0\0\0\n", b"[2]\n", b"{"]
)
def test_a_torn_last_line_is_cut_off(output, torn):
    with begin(output) as current:
        current.append({"layer": 1})
        path = current.path("journal.jsonl")
    path.write_bytes(path.read_bytes() + torn)
    with Job.resume(output, SETTINGS) as current:
        assert current.entries == [{"layer": 1}]
        current.append({"layer": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"layer": 1}, {"layer": 2}
    ]  # fmt: skip


def test_damage_before_the_last_line_is_refused(output):
    with begin(output) as current:
        for layer in range(3):
            current.append({"layer": layer})
        path = current.path("journal.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"layer": 1', b'"layer: 1'))
    with pytest.raises(ResumeError, match=r"journal\.jsonl: line 2 of 3 is damaged"):
        Job.resume(output, SETTINGS)


def test_a_line_that_could_not_be_written_leaves_no_half(output, monkeypatch):
    with begin(output) as current:
        current.append({"layer": 1})

        def full(descriptor):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(journal.os, "fsync", full)
            with pytest.raises(OutputError, match=r"disk is full.*bytes are needed"):
                current.append({"layer": 2})
        assert current.entries == [{"layer": 1}]
        current.append({"layer": 3})
    with Job.resume(output, SETTINGS) as current:
        assert current.entries == [{"layer": 1}, {"layer": 3}]
