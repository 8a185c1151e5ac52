"""A batch that is started again, whatever happened to its jobs, its file and its outputs since."""

from __future__ import annotations

import json
import shutil

import pytest

from reap_stream.batch import process
from reap_stream.batch.waiting import wait_for_job
from reap_stream.checkpoint.lock import Lock
from reap_stream.cli import main
from reap_stream.outputs import PrunedOutputs
from tests.batches import DEFAULTS, run_batch, states, stay_in_process, write_jobs
from tests.builders import save, tiny_model
from tests.engine import prune_to
from tests.families import BY_ID


@pytest.fixture
def defaults(tiny, calibration):
    return {**DEFAULTS, "model": str(tiny("glm4_moe")), "calibration": list(calibration)}


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    stay_in_process(monkeypatch)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "jobs.toml"


def log_of(path, name):
    return (path.parent / "jobs.reap-batch" / f"{name}.log").read_text(encoding="utf-8")


def interrupt(monkeypatch):
    """Has a pass be interrupted before its end."""

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(PrunedOutputs, "finish_rest", stop)


def test_what_others_put_in_a_failed_jobs_place_is_not_its_result(
    defaults, path, tiny, calibration, tmp_path, capsys
):
    (tmp_path / ".a.reap-job").write_text("in the way", encoding="utf-8")
    write_jobs(path, defaults, {"output": "a"})
    assert states(run_batch(path, code=1)) == [("a", "failed", "prune")]
    (tmp_path / ".a.reap-job").unlink()
    prune_to(tmp_path / "a", tiny("glm4_moe"), calibration)
    assert main(["batch", str(path)]) == 2
    assert "job 'a':" in capsys.readouterr().err
    # Nor is it where a batch was killed, and something else lies there.
    shutil.rmtree(tmp_path / "jobs.reap-batch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "run_line", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        shutil.rmtree(tmp_path / "a")
        assert main(["batch", str(path)]) == 130
    prune_to(tmp_path / "a", tiny("glm4_moe"), calibration, keep=6)
    assert main(["batch", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_job_is_known_by_its_output(defaults, path):
    write_jobs(path, defaults, {"output": "a"}, {"output": "summary", "keep": 6})
    run_batch(path)
    renamed = {"output": "a", "name": "summary"}, {"output": "summary", "keep": 6, "name": "lock"}
    write_jobs(path, defaults, *renamed)
    assert states(run_batch(path)) == [("summary", "skipped", ""), ("lock", "skipped", "")]


def test_a_target_that_is_gone_is_named(defaults, path, tmp_path, capsys):
    write_jobs(path, defaults, {"output": "a", "keep": [4, 6]})
    run_batch(path)
    shutil.rmtree(tmp_path / "a" / "keep-6")
    assert main(["batch", str(path)]) == 2
    assert f"{tmp_path}/a/keep-6 was written and is gone" in capsys.readouterr().err
    write_jobs(path, {**defaults, "overwrite": True}, {"output": "a", "keep": [4, 6]})
    assert states(run_batch(path)) == [("a", "done", "prune")]
    # Where nothing is left, it is simply written again.
    write_jobs(path, defaults, {"output": "a", "keep": [4, 6]})
    shutil.rmtree(tmp_path / "a")
    assert states(run_batch(path)) == [("a", "done", "prune")]


def test_what_took_the_place_of_a_result_is_not_passed_on(
    defaults, path, tiny, calibration, tmp_path, capsys
):
    write_jobs(path, defaults, {"output": "a"})
    run_batch(path)
    shutil.move(tmp_path / "a", tmp_path / "aside")
    prune_to(tmp_path / "a", tiny("glm4_moe"), calibration, keep=6)
    write_jobs(path, defaults, {"output": "a", "verify": True})
    assert main(["batch", str(path)]) == 2
    assert f"{tmp_path}/a is another's now" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(tmp_path / "aside", tmp_path / "a")
    assert states(run_batch(path)) == [("a", "done", "")]


def test_a_half_done_job_whose_scores_are_gone_is_begun_anew(defaults, path, tmp_path):
    write_jobs(path, defaults, {"output": "a"})
    run_batch(path)
    write_jobs(path, defaults, {"output": "a"}, {"output": "b", "keep": 6})
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch)
        assert states(run_batch(path, code=1))[1] == ("b", "failed", "compact")
    assert (tmp_path / ".b.reap-job").exists()
    shutil.rmtree(tmp_path / "a")
    write_jobs(path, defaults, {"output": "b", "keep": 6})
    assert states(run_batch(path)) == [("b", "done", "prune")]


def test_scores_of_a_model_that_was_replaced_are_not_used(defaults, path, tiny, tmp_path):
    shutil.copytree(tiny("glm4_moe"), tmp_path / "model")
    defaults |= {"model": "model"}
    write_jobs(path, defaults, {"output": "a"})
    run_batch(path)
    save(tiny_model(BY_ID["glm4_moe"], seed=1), tmp_path / "model")
    write_jobs(path, defaults, {"output": "a"}, {"output": "b", "keep": 6, "verify": True})
    assert states(run_batch(path)) == [("a", "skipped", ""), ("b", "done", "prune")]


def test_what_cannot_be_resumed_is_replaced_only_where_that_was_asked_for(defaults, path, tmp_path):
    write_jobs(path, defaults, {"output": "a"})
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch)
        run_batch(path, code=1)
    record = tmp_path / ".a.reap-job" / "job.json"
    record.write_text(record.read_text().replace('"version": "', '"version": "0.0.'))
    (job,) = run_batch(path, code=1)
    assert "version was" in job["error"]
    write_jobs(path, {**defaults, "overwrite": True}, {"output": "a"})
    assert states(run_batch(path)) == [("a", "done", "prune")]
    lines = [line.split()[-1] for line in log_of(path, "a").splitlines() if line.startswith("$ ")]
    assert lines == ["--max-shard-size=40kB", "--resume", "--resume", "--overwrite"]


def test_the_summary_tells_how_far_a_batch_is(defaults, path, tmp_path, monkeypatch, capsys):
    summary, seen, run_line = tmp_path / "jobs.reap-batch" / "summary.json", [], process.run_line

    def looking(line, base, log):
        jobs = json.loads(summary.read_text(encoding="utf-8"))["jobs"]
        seen.append([job["state"] for job in jobs])
        if log.stem == "b":
            raise KeyboardInterrupt
        return run_line(line, base, log)

    monkeypatch.setattr(process, "run_line", looking)
    write_jobs(
        path, defaults, {"output": "a"}, {"output": "b", "keep": 6}, {"output": "c", "keep": 2}
    )
    jobs = run_batch(path, code=130)
    assert seen == [["running", "waiting", "waiting"], ["done", "running", "waiting"]]
    assert [job["state"] for job in jobs] == ["done", "interrupted", "not run"]
    printed = capsys.readouterr()
    assert "The same command goes on" in printed.err
    assert "total: 3" in printed.out
    assert "1 done, 1 interrupted, 1 not run" in printed.out
    total = json.loads(summary.read_text(encoding="utf-8"))["total"]
    assert total["states"] == {"done": 1, "interrupted": 1, "not run": 1}
    assert total["written_nbytes"] == jobs[0]["run"]["written_nbytes"]
    monkeypatch.setattr(process, "run_line", run_line)
    again = run_batch(path)
    assert states(again) == [
        ("a", "skipped", ""),
        ("b", "done", "compact"),
        ("c", "done", "compact"),
    ]
    # What an earlier start took stays known.
    assert again[0]["seconds"] == jobs[0]["seconds"] > 0
    assert again[0]["run"] == jobs[0]["run"]


def test_a_disk_that_takes_no_record_fails_jobs_and_not_the_batch(
    defaults, path, tmp_path, monkeypatch, capsys
):
    write_jobs(path, defaults, {"output": "a"}, {"output": "b", "keep": 6})
    records = tmp_path / "jobs.reap-batch" / "records"
    records.parent.mkdir()
    records.write_text("in the way", encoding="utf-8")
    jobs = run_batch(path, code=1)
    assert [job["state"] for job in jobs] == ["failed", "failed"]
    assert "records" in jobs[0]["error"]
    (records.parent / ".summary.json.partial").mkdir()
    assert main(["batch", str(path)]) == 1
    assert capsys.readouterr().err.count("the summary could not be written") == 1


def test_a_job_that_still_ends_is_waited_for(tmp_path):
    output = tmp_path / "out"
    wait_for_job(output, lambda _: pytest.fail("there is nothing to wait for"))
    (tmp_path / ".out.reap-job").mkdir()
    lock, said = Lock.acquire(tmp_path / ".out.reap-job" / "lock"), []

    def say(text):
        said.append(text)
        lock.release()

    wait_for_job(output, say)
    assert len(said) == 1
    assert "is working on this output" in said[0]
