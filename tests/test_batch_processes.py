"""The processes of a batch: each command in its own, and none left behind by a batch that ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reap_stream.batch import asking, process
from reap_stream.batch.jobs_file import read_jobs
from reap_stream.batch.lines import writing_line
from reap_stream.batch.process import safe_environment
from tests.batches import DEFAULTS, QUESTION, run_batch, states, stay_in_process, write_jobs
from tests.engine import prune_to


@pytest.fixture
def defaults(tiny, calibration):
    return {**DEFAULTS, "model": str(tiny("glm4_moe")), "calibration": list(calibration)}


def shards(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


FROM_311 = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="Python 3.10 imports from where it is run"
)


def lay_traps(directory):
    """Modules that must not be imported from where a batch lies."""
    for name in ("torch", "reap_stream", "json"):
        (directory / f"{name}.py").write_text("raise SystemExit(77)", encoding="utf-8")


@FROM_311
def test_a_command_runs_in_a_process_of_its_own_and_leaves_a_log(tmp_path):
    lay_traps(tmp_path)
    log = tmp_path / "a.log"
    assert process.run_line(["--version"], tmp_path, log) == 0
    assert process.run_line(["prune", "a b"], tmp_path, log) == 2
    first, version, second, *said = log.read_text(encoding="utf-8").splitlines()
    assert (first, second) == ("$ reap-stream --version", "$ reap-stream prune 'a b'")
    assert version.startswith("reap-stream ")
    assert "required" in said[-1]
    assert process.why_failed(2, log).startswith("exit 2: ")


@pytest.mark.slow
@FROM_311
def test_jobs_are_checked_and_run_in_processes_of_their_own(defaults, tmp_path):
    lay_traps(tmp_path)
    path = write_jobs(tmp_path / "jobs.toml", defaults, {"output": "a"})
    (job,) = run_batch(path)
    assert job["state"] == "done", job
    assert (tmp_path / "a" / "config.json").is_file()
    log = (tmp_path / "jobs.reap-batch" / "a.log").read_text(encoding="utf-8")
    assert log.startswith(f"$ reap-stream prune {defaults['model']} --output {tmp_path}/a ")


def test_the_batch_itself_needs_no_torch():
    code = (
        "import reap_stream.batch.command, sys; "
        "sys.exit(not {'torch', 'transformers', 'huggingface_hub'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Starts a batch whose jobs were checked already: one start of torch less.
CHECKED = (
    "import json, sys; from reap_stream.batch import asking; from reap_stream.cli import main; "
    "asking.ask = lambda *_: json.loads(sys.argv[2]); sys.exit(main(['batch', sys.argv[1]]))"
)


def start(path, answers):
    return subprocess.Popen(
        [sys.executable, "-c", CHECKED, str(path), json.dumps(answers)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**safe_environment(), "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_batch_that_is_killed_goes_on(number, defaults, calibration, tmp_path, monkeypatch):
    path = write_jobs(
        tmp_path / "jobs.toml", {**defaults, "snapshot-minutes": 0.0}, {"output": "a"}
    )
    with monkeypatch.context() as patch:
        stay_in_process(patch)
        answers = asking.ask([{**QUESTION, "line": writing_line(read_jobs(path)[0])}], tmp_path)
    started = start(path, answers)
    job = tmp_path / ".a.reap-job"
    journal = job / "journal.jsonl"
    wait_for(lambda: journal.exists() and journal.stat().st_size > 0)
    started.send_signal(number)
    assert started.wait(60) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    # What was known of the job is readable, however the batch ended.
    summary = json.loads((tmp_path / "jobs.reap-batch" / "summary.json").read_text())
    state = summary["jobs"][0]["state"]
    done = (tmp_path / "a").exists()
    assert state == ("running" if number == signal.SIGKILL else "interrupted") or done
    # The job ends with the batch: a start right behind it waits for that, and goes on.
    stay_in_process(monkeypatch)
    jobs = run_batch(path)
    assert states(jobs) == [("a", "skipped" if done else "done", "" if done else "prune")]
    log = (tmp_path / "jobs.reap-batch" / "a.log").read_text(encoding="utf-8")
    assert done or "--resume" in log
    model = Path(defaults["model"])
    alone = prune_to(tmp_path / "alone", model, calibration, max_shard_nbytes=40_000)
    assert shards(tmp_path / "a") == shards(alone)


def test_a_command_is_told_from_what_ended_it(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("$ reap-stream prune m\nreap-stream: the disk is full\n$ reap-stream prune m\n")
    assert "ended by SIGKILL: memory may have been short" in process.why_failed(-9, log)
    assert "disk is full" not in process.why_failed(-9, log)
    assert process.why_failed(-signal.SIGSEGV, log) == "ended by SIGSEGV"
    assert process.why_failed(1, log) == "exit 1: it said nothing"
    with log.open("a") as stream:
        stream.write(" 50%|#### \r 60%|##### \rreap-stream: no room\nsomething else\n")
    assert process.why_failed(1, log) == "exit 1: no room"
