"""Jobs on a model of the Hub that were stopped: they go on at their commit, and inside a shard."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from reap_stream.cli import main
from reap_stream.layer_pass import LayerPass
from reap_stream.sources import local_sources
from tests.hub_checkpoints import (
    HEADER_NBYTES,
    RUN,
    assert_same_weights,
    prune,
    seven_shards,
    shards,
    specs,
    wait_for,
)
from tests.hub_server import Fault
from tests.model_hub_client import RUN_IN_PIECES, environment

NAME = "org/resumed-moe"
LATE = "00005-of-00007.safetensors"


@pytest.fixture(scope="module")
def source(tiny):
    return seven_shards(tiny)


@pytest.fixture(scope="module")
def moved(source, tmp_path_factory):
    """What the branch holds later: other weights."""
    folder = tmp_path_factory.mktemp("moved")
    for path in source.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    last = shards(folder)[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.unlink()
    last.write_bytes(content)
    return folder


def test_a_killed_run_goes_on_at_its_commit_inside_the_shard(
    hub, calibration, tmp_path, from_directory, moved
):
    output = tmp_path / "out"
    line = ["prune", NAME, "--output", output, *specs(calibration), *RUN, "--keep", 4, "--evict"]
    hub.faults.append(Fault(LATE, "slow", times=99, seconds=0.05))
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_IN_PIECES, *map(str, line)],
        env={**environment(hub.url, tmp_path / "cache"), "PATH": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: hub.sent(LATE) > 150_000)
    process.kill()
    process.wait()
    hub.faults.clear()
    hub.forget()
    (partial,) = (tmp_path / ".out.reap-source").rglob("*.partial")
    done = partial.stat().st_size
    assert done > 0
    hub.move(NAME, moved)
    assert prune(NAME, output, calibration, "--evict", "--resume") == 0
    assert_same_weights(output, from_directory)
    assert f"bytes={done}-" in [request.range for request in hub.asked("GET", LATE)]
    record = json.loads((output / "reap" / "run.json").read_text(encoding="utf-8"))
    assert record["source"]["revision"] == hub.commit
    assert not (tmp_path / ".out.reap-source").exists()


def test_a_compact_that_failed_does_not_fetch_again_what_it_wrote(
    hub, calibration, tmp_path, from_directory, moved, capsys
):
    scores = tmp_path / "scores.safetensors"
    options = [*specs(calibration), *RUN]
    assert main(["observe", NAME, "--output", str(scores), *options, "--evict"]) == 0
    line = ["compact", NAME, "--scores", str(scores), "--keep", "4", "--evict"]
    line += ["--output", str(tmp_path / "out")]
    # The header comes, the shard does not.
    passes, fails = Fault(LATE, "slow"), Fault(LATE, "status", status=403, times=99)
    hub.faults += [passes, fails]
    assert main(line) == 1
    assert "The same command with --resume goes on." in capsys.readouterr().err
    hub.faults.clear()
    hub.forget()
    # It goes on at the commit that it was begun with.
    newer = hub.move(NAME, moved)
    assert main([*line, "--resume"]) == 0
    assert not [request for request in hub.requests if newer in request.path]
    assert_same_weights(tmp_path / "out", from_directory)
    whole = {r.path for r in hub.requests if "/large/" in r.path and r.nbytes > HEADER_NBYTES}
    assert len(whole) < 5


def stop_in_the_pass(model, output, calibration):
    """Interrupts a run in its third layer."""
    finish = LayerPass._finish

    def stop(own, index, *rest):
        if index == 2:
            raise KeyboardInterrupt
        finish(own, index, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerPass, "_finish", stop)
        assert prune(model, output, calibration) == 130


@pytest.mark.parametrize("revision", ["", "@main"])
def test_a_branch_that_moved_is_not_followed(
    hub, calibration, tmp_path, from_directory, moved, revision
):
    """The commit in the job's record counts, also where the command names the branch."""
    output = tmp_path / "out"
    stop_in_the_pass(f"{NAME}{revision}", output, calibration)
    newer = hub.move(NAME, moved)
    hub.forget()
    assert prune(f"{NAME}{revision}", output, calibration, "--resume") == 0
    assert_same_weights(output, from_directory)
    assert not [request for request in hub.requests if newer in request.path]
    record = json.loads((output / "reap" / "run.json").read_text(encoding="utf-8"))
    assert record["source"]["revision"] == hub.commit


def test_another_commit_is_refused_on_resume(hub, calibration, tmp_path, moved, capsys):
    output = tmp_path / "out"
    stop_in_the_pass(NAME, output, calibration)
    newer = hub.move(NAME, moved)
    assert prune(f"{NAME}@{newer}", output, calibration, "--resume") != 0
    assert "source" in capsys.readouterr().err


@pytest.mark.parametrize("evict", [[], ["--evict"]], ids=["cache", "evict"])
def test_a_checkpoint_is_verified_against_the_commit_it_was_made_of(
    hub, calibration, tmp_path, moved, capsys, evict
):
    output = tmp_path / "out"
    assert prune(NAME, output, calibration, "--evict") == 0
    hub.move(NAME, moved)
    capsys.readouterr()
    assert main(["verify", str(output), "--source", NAME, *evict]) == 0
    assert f"identical to {NAME}@{hub.commit}" in capsys.readouterr().out
    # Whoever names a branch means it.
    assert main(["verify", str(output), "--source", f"{NAME}@main", *evict]) == 1
    assert "is not what its source says" in capsys.readouterr().err


@pytest.mark.parametrize(
    "record", ["{", "[]", '{"source": 3}', '{"source": {"repository": "a/b"}}']
)
def test_a_record_that_says_nothing_pins_nothing(hub, calibration, tmp_path, record):
    output = tmp_path / "out"
    assert prune(NAME, output, calibration, "--evict") == 0
    (output / "reap" / "run.json").write_text(record, encoding="utf-8")
    arguments = argparse.Namespace(source=Path(NAME), directory=output)
    with local_sources("verify", arguments):
        assert arguments.source.name == hub.commit
