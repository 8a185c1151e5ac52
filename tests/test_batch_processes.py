"""The processes of a batch: each command in its own, and none left behind by a batch that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from reap_stream.batch.running import safe_environment
from reap_stream.cli import main
from tests.batches import DEFAULTS, run_batch, states, write_jobs


@pytest.fixture
def defaults(tiny, calibration):
    return {**DEFAULTS, "model": str(tiny("glm4_moe")), "calibration": list(calibration)}


def shards(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 imports from where it is run")
def test_commands_run_in_processes_that_import_nothing_of_where_they_run(defaults, tmp_path):
    for name in ("torch", "reap_stream", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(77)", encoding="utf-8")
    path = write_jobs(tmp_path / "jobs.toml", defaults, {"output": "a"})
    (job,) = run_batch(path)
    assert job["state"] == "done", job
    assert (tmp_path / "a" / "config.json").is_file()
    log = (tmp_path / "jobs.reap-batch" / "a.log").read_text(encoding="utf-8")
    assert log.startswith(f"$ reap-stream prune {defaults['model']} --output {tmp_path}/a ")


def start(path):
    return subprocess.Popen(
        [sys.executable, "-m", "reap_stream", "batch", str(path)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**safe_environment(), "OMP_NUM_THREADS": "1"},
        text=True,
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_batch_that_is_killed_goes_on(number, defaults, tmp_path):
    path = write_jobs(
        tmp_path / "jobs.toml",
        {**defaults, "snapshot-minutes": 0.0},
        {"output": "a"},
        {"output": "b", "samples": 3},
    )
    process = start(path)
    begun = tmp_path / ".b.reap-job" / "journal.jsonl"
    wait_for(lambda: begun.exists() and begun.stat().st_size > 0)
    process.send_signal(number)
    assert process.wait(60) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    process.stderr.close()
    # The job ends with the batch: nothing holds its output.
    pid = int((tmp_path / ".b.reap-job" / "lock").read_text().split()[0]) if begun.exists() else 0
    wait_for(lambda: not pid or not is_alive(pid))
    done = (tmp_path / "b").exists()
    jobs = run_batch(path)
    assert states(jobs)[0] == ("a", "skipped", "")
    assert states(jobs)[1] == (("b", "skipped", "") if done else ("b", "done", "prune"))
    log = (tmp_path / "jobs.reap-batch" / "b.log").read_text(encoding="utf-8")
    assert done or "--resume" in log
    defaults_alone = {**defaults, "snapshot-minutes": 0.0}
    alone = write_jobs(tmp_path / "alone.toml", defaults_alone, {"output": "c", "samples": 3})
    assert main(["batch", str(alone)]) == 0
    assert shards(tmp_path / "b") == shards(tmp_path / "c")


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
