"""Many jobs from one file: order, sharing of one reading, failures, and starting again."""

from __future__ import annotations

import json

import pytest

from reap_stream.cli import main
from tests.batches import DEFAULTS, record_of, run_batch, states, stay_in_process, write_jobs
from tests.engine import prune_to, read_kept
from tests.resuming import contents
from tests.upload_server import accepting, log_in


@pytest.fixture
def defaults(tiny, calibration):
    return {**DEFAULTS, "model": str(tiny("glm4_moe")), "calibration": list(calibration)}


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    stay_in_process(monkeypatch)


@pytest.fixture
def logged_in(monkeypatch, tmp_path):
    """A Hub that takes uploads, with a client that may."""
    with accepting() as hub:
        log_in(monkeypatch, hub.url, tmp_path / "cache")
        yield hub


def shards(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def test_jobs_share_one_reading_and_give_what_each_would_alone(
    defaults, tiny, calibration, tmp_path, capsys
):
    path = write_jobs(
        tmp_path / "jobs.toml",
        defaults,
        {"output": "out/{method}", "method": ["reap", "ean"], "name": "by-{method}"},
        {"output": "out/several", "keep": [4, 6], "weights": "bf16", "verify": True},
        {"output": "out/own", "samples": 2},
    )
    jobs = run_batch(path)
    assert states(jobs) == [
        ("by-reap", "done", "prune"),
        ("by-ean", "done", "compact"),
        ("out-several", "done", "compact"),
        ("out-own", "done", "prune"),
    ]
    model = tiny("glm4_moe")
    options = {"batch_tokens": 72, "max_shard_nbytes": 40_000}
    for method in ("reap", "ean"):
        alone = prune_to(tmp_path / f"alone-{method}", model, calibration, method=method, **options)
        assert shards(tmp_path / "out" / method) == shards(alone)
        assert read_kept(tmp_path / "out" / method) == read_kept(alone)
    alone = prune_to(
        tmp_path / "alone", model, calibration, "4,6", weights="bf16", mtp=None, **options
    )
    for keep in ("keep-4", "keep-6"):
        assert shards(tmp_path / "out" / "several" / keep) == shards(alone / keep)
    # A job that was compacted copied what it kept, and ran nothing.
    read = {job["name"]: job["run"]["read_nbytes"] for job in jobs}
    assert read["by-ean"] < read["by-reap"]
    log = (tmp_path / "jobs.reap-batch" / "out-several.log").read_text(encoding="utf-8")
    assert log.count("$ reap-stream verify") == 2
    assert "identical to" in log
    printed = capsys.readouterr()
    assert "by-reap" in printed.out
    assert "[2/4] by-ean: compact →" in printed.err


def test_a_failing_job_does_not_stop_the_rest(defaults, tmp_path, capsys):
    (tmp_path / "broken.jsonl").write_text("no record\n", encoding="utf-8")
    path = write_jobs(
        tmp_path / "jobs.toml",
        defaults,
        {"output": "a"},
        {"output": "b", "calibration": "broken.jsonl"},
        {"output": "c", "keep": 6},
    )
    jobs = run_batch(path, code=1)
    assert states(jobs) == [
        ("a", "done", "prune"),
        ("b", "failed", "prune"),
        ("c", "done", "compact"),
    ]
    assert jobs[1]["exit_code"] == 2
    assert "exit 2: " in jobs[1]["error"]
    assert not (tmp_path / "b").exists()
    assert "1 of 3 jobs failed: b" in capsys.readouterr().err
    # Started again, what is done is left alone and what failed is tried again.
    before = contents(tmp_path / "c")
    path.write_text(path.read_text(encoding="utf-8").replace("broken.jsonl", "good.npy"))
    good = defaults["calibration"][0]
    (tmp_path / "good.npy").symlink_to(good)
    jobs = run_batch(path)
    assert states(jobs) == [("a", "skipped", ""), ("b", "done", "prune"), ("c", "skipped", "")]
    assert contents(tmp_path / "c") == before


def test_fail_fast_stops(defaults, tmp_path):
    (tmp_path / "broken.jsonl").write_text("no record\n", encoding="utf-8")
    path = write_jobs(
        tmp_path / "jobs.toml",
        defaults,
        {"output": "a", "calibration": "broken.jsonl"},
        {"output": "b"},
    )
    jobs = run_batch(path, "--fail-fast", code=1)
    assert states(jobs) == [("a", "failed", "prune"), ("b", "not run", "")]
    assert not (tmp_path / "b").exists()


def test_where_the_first_job_fails_the_next_reads_the_model(defaults, tmp_path):
    path = write_jobs(tmp_path / "jobs.toml", defaults, {"output": "a"}, {"output": "b", "keep": 6})
    # No directory can be made below a file.
    (tmp_path / ".a.reap-job").write_text("in the way", encoding="utf-8")
    jobs = run_batch(path, code=1)
    assert states(jobs) == [("a", "failed", "prune"), ("b", "done", "prune")]
    (tmp_path / ".a.reap-job").unlink()
    assert states(run_batch(path)) == [("a", "done", "compact"), ("b", "skipped", "")]


def test_json_and_dry_run(defaults, tmp_path, capsys, logged_in):
    path = write_jobs(
        tmp_path / "jobs.toml",
        defaults,
        {"output": "a", "sparsity": [0.25, "0.5"], "upload": "me/tiny-{keep}", "public": True},
        {"output": "b", "verify": True, "upload": "me/tiny"},
    )
    assert main(["batch", str(path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "jobs.reap-batch").exists()
    assert [line.split()[1] for line in lines] == [
        *(str(tmp_path), "prune", "upload", "upload", "compact", "verify", "upload"),
    ]
    assert "--sparsity=0.25,0.5" in lines[1]
    assert lines[2] == f"reap-stream upload {tmp_path}/a/keep-6 me/tiny-6 --public"
    assert f"--scores {tmp_path}/a/keep-6/reap/scores.safetensors" in lines[4]
    assert lines[6] == f"reap-stream upload {tmp_path}/b me/tiny"
    path = write_jobs(tmp_path / "jobs.toml", defaults, {"output": "b"})
    assert main(["batch", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format_version"] == 1
    assert [job["state"] for job in found["jobs"]] == ["done"]
    assert [entry["directory"] for entry in found["jobs"][0]["checkpoints"]] == [
        str(tmp_path / "b")
    ]


def test_killed_between_the_end_of_a_job_and_its_record(defaults, tmp_path):
    path = write_jobs(tmp_path / "jobs.toml", {**defaults, "overwrite": True}, {"output": "a"})
    run_batch(path)
    record = record_of(path, "a")
    document = json.loads(record.read_text(encoding="utf-8"))
    assert document["written"]
    record.write_text(json.dumps({**document, "written": False}), encoding="utf-8")
    assert states(run_batch(path)) == [("a", "skipped", "")]
    # What lay there before the job began is not its result.
    number = (tmp_path / "a").stat().st_ino
    document |= {"written": False, "before": number}
    record.write_text(json.dumps(document), encoding="utf-8")
    assert states(run_batch(path)) == [("a", "done", "prune")]


def test_other_settings_are_refused_by_name(defaults, tmp_path, capsys):
    path = write_jobs(tmp_path / "jobs.toml", defaults, {"output": "a"})
    run_batch(path)
    write_jobs(path, {**defaults, "memory": "8GiB"}, {"output": "a"})
    assert states(run_batch(path)) == [("a", "skipped", "")]
    write_jobs(path, {**defaults, "keep": 6}, {"output": "a"})
    assert main(["batch", str(path)]) == 2
    assert "keep was ['4'], is ['6']" in capsys.readouterr().err
    write_jobs(path, {**defaults, "keep": 6, "overwrite": True}, {"output": "a"})
    assert states(run_batch(path)) == [("a", "done", "prune")]
    assert states(run_batch(path)) == [("a", "skipped", "")]


def test_a_step_that_was_added_is_done_alone(defaults, tmp_path):
    path = write_jobs(tmp_path / "jobs.toml", defaults, {"output": "a"})
    run_batch(path)
    write_jobs(path, defaults, {"output": "a", "verify": True})
    jobs = run_batch(path)
    assert states(jobs) == [("a", "done", "")]
    log = (tmp_path / "jobs.reap-batch" / "a.log").read_text(encoding="utf-8")
    assert log.count("$ reap-stream prune") == 1
    assert log.count("$ reap-stream verify") == 1
    assert states(run_batch(path)) == [("a", "skipped", "")]
