"""What follows the writing: evaluated together, reported, carded; done again only where it must be."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest

from reap_stream.batch import checking_steps
from reap_stream.cli import main
from tests.batches import DEFAULTS, run_batch, states, stay_in_process, write_jobs


@pytest.fixture
def defaults(tiny, calibration, tmp_path):
    np.save(tmp_path / "held-out.npy", np.arange(24).reshape(2, 12) % 90)
    model = str(tiny("glm4_moe"))
    return {**DEFAULTS, "model": model, "calibration": list(calibration), "eval": "held-out.npy"}


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    stay_in_process(monkeypatch)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "jobs.toml"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def commands(path, name):
    """The commands of a job's log."""
    return [line.split()[2] for line in log_of(path, name).splitlines() if line.startswith("$ ")]


def log_of(path, name):
    return (path.parent / "jobs.reap-batch" / f"{name}.log").read_text(encoding="utf-8")


def test_what_shares_a_model_is_evaluated_in_one_reading(defaults, path, tmp_path, capsys):
    write_jobs(
        path,
        defaults,
        {"output": "by-{method}", "method": ["reap", "ean"], "keep": [4, 6]},
        {"output": "own", "eval": {"text": ["held-out.npy:1"], "batch-tokens": 36}},
    )
    jobs = run_batch(path)
    assert states(jobs) == [
        ("by-reap", "done", "prune"),
        ("by-ean", "done", "compact"),
        ("own", "done", "compact"),
    ]
    assert commands(path, "by-reap") == ["prune", "eval", "card", "card"]
    assert commands(path, "by-ean") == ["compact", "card", "card"]
    assert commands(path, "own") == ["compact", "eval", "card"]
    # The same figures as of an evaluation by hand, and each checkpoint has its own.
    directories = [tmp_path / name / keep for name in ("by-reap", "by-ean") for keep in KEEPS]
    alone = tmp_path / "alone.json"
    options = ["--text", str(tmp_path / "held-out.npy"), "--compute-dtype", "float32"]
    options += ["--batch-tokens", "72", "--output", str(alone)]
    assert main(["eval", defaults["model"], *map(str, directories), *options]) == 0
    expected = [candidate["all"] for candidate in read(alone)["candidates"]]
    for directory, figures in zip(directories, expected[1:], strict=True):
        source, own = read(directory / "reap" / "eval.json")["candidates"]
        assert (source["all"], own["all"]) == (expected[0], figures)
        assert f"{figures['loss']:.4f}" in (directory / "README.md").read_text(encoding="utf-8")
    found = [target["evaluation"] for job in jobs[:2] for target in job["checkpoints"]]
    assert [entry["loss"] for entry in found] == [figures["loss"] for figures in expected[1:]]
    assert [entry["kl"] for entry in found] == [figures["kl"] for figures in expected[1:]]
    assert jobs[0]["source_evaluation"]["loss"] == expected[0]["loss"]
    assert f"{found[0]['loss']:.4f}" in capsys.readouterr().out


KEEPS = ("keep-4", "keep-6")


def test_one_reading_costs_one_reading(defaults, path, tmp_path):
    """By bytes: all methods and targets of a model are scored, and evaluated, in one pass each."""
    methods = ["reap", "ean", "frequency", "gate"]
    write_jobs(path, defaults, {"output": "{method}", "method": methods, "keep": [4, 6]})
    jobs = run_batch(path)
    assert [job["how"] for job in jobs] == ["prune", *["compact"] * 3]
    source = nbytes(tmp_path, defaults["model"])
    written = {job["name"]: job["run"]["written_nbytes"] for job in jobs}
    read_nbytes = {job["name"]: job["run"]["read_nbytes"] for job in jobs}
    assert source <= read_nbytes["reap"] <= 1.5 * source
    for name in methods[1:]:
        # What is copied is what is kept: nothing was read to be run.
        assert read_nbytes[name] <= written[name]
    evaluations = list((tmp_path / "jobs.reap-batch" / "evaluations").glob("*/all.json"))
    assert len(evaluations) == len(methods)
    (whole,) = {read(found)["read_nbytes"] for found in evaluations}
    outputs = [tmp_path / name / keep for name in methods for keep in KEEPS]
    assert whole <= 1.2 * (source + sum(nbytes(tmp_path, output) for output in outputs))


def nbytes(tmp_path, directory):
    return sum(path.stat().st_size for path in (tmp_path / directory).glob("*.safetensors"))


def test_only_what_is_missing_is_done_again(defaults, path, tmp_path):
    write_jobs(path, {**defaults, "eval": False}, {"output": "a"})
    assert run_batch(path)[0]["checkpoints"][0]["evaluation"] is None
    assert not (tmp_path / "a" / "reap" / "eval.json").exists()
    write_jobs(path, defaults, {"output": "a", "report": "pages/{model}-{keep}.html"})
    assert states(run_batch(path)) == [("a", "done", "")]
    assert commands(path, "a") == ["prune", "eval", "report", "card"]
    (page,) = (tmp_path / "pages").glob("*-4.html")
    assert "loss" in page.read_text(encoding="utf-8")
    assert states(run_batch(path)) == [("a", "skipped", "")]
    # Another text: what shows its result is made anew, and what was pruned stays.
    write_jobs(path, {**defaults, "eval": "held-out.npy:1"}, {"output": "a", "report": str(page)})
    assert states(run_batch(path)) == [("a", "done", "")]
    assert commands(path, "a")[4:] == ["eval", "report", "card"]
    # What was found is found again, for what is still to be made from it.
    shutil.rmtree(tmp_path / "jobs.reap-batch" / "evaluations")
    assert states(run_batch(path)) == [("a", "done", "")]
    assert commands(path, "a")[7:] == ["eval"]
    # More memory is no other evaluation.
    more = {**defaults, "eval": "held-out.npy:1", "memory": "4GiB"}
    write_jobs(path, more, {"output": "a", "report": str(page)})
    assert states(run_batch(path)) == [("a", "skipped", "")]


def test_evaluations_are_known_by_the_output(defaults, path, tmp_path):
    """Names may change, or change places."""
    jobs = {"output": "a", "name": "one", "method": "reap"}, {"output": "b", "method": "random"}
    write_jobs(path, defaults, *jobs)
    losses = [job["checkpoints"][0]["evaluation"]["loss"] for job in run_batch(path)]
    assert losses[0] != losses[1]
    more = {**defaults, "report": True}
    write_jobs(path, more, {**jobs[0], "name": "b"}, {**jobs[1], "name": "one"})
    again = run_batch(path)
    assert [job["checkpoints"][0]["evaluation"]["loss"] for job in again] == losses
    pages = [(tmp_path / f"{name}.html").read_text(encoding="utf-8") for name in "ab"]
    for own, loss, other in zip(pages, losses, losses[::-1], strict=True):
        assert (f"{loss:.4f}" in own, f"{other:.4f}" in own) == (True, False)


def test_figures_of_an_earlier_checkpoint_are_not_shown(defaults, path, tmp_path):
    write_jobs(path, defaults, {"output": "a"})
    assert run_batch(path)[0]["checkpoints"][0]["evaluation"]
    (tmp_path / "broken.npy").write_bytes(b"no array")
    broken = {"output": "a", "overwrite": True, "keep": 6, "eval": "broken.npy"}
    write_jobs(path, defaults, broken)
    (job,) = run_batch(path, code=1)
    assert job["status"] == "written, not evaluated"
    assert (job["checkpoints"][0]["evaluation"], job["source_evaluation"]) == (None, None)


def test_a_damaged_output_fails_alone(defaults, path, tmp_path, capsys):
    write_jobs(path, {**defaults, "eval": False}, {"output": "a"}, {"output": "b", "keep": 6})
    run_batch(path)
    shard = next((tmp_path / "a").glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    write_jobs(path, defaults, {"output": "a"}, {"output": "b", "keep": 6})
    failed, done = run_batch(path, code=1)
    assert (failed["state"], failed["status"]) == ("failed", "written, not evaluated")
    assert shard.name in failed["error"]
    assert (done["state"], done["checkpoints"][0]["evaluation"] is None) == ("done", False)
    assert "written, not evaluated" in capsys.readouterr().out
    shard.write_bytes(whole)
    assert states(run_batch(path)) == [("a", "done", ""), ("b", "skipped", "")]


def test_fail_fast_leaves_what_waits_to_be_evaluated(defaults, path, tmp_path):
    (tmp_path / "broken.jsonl").write_text("no record\n", encoding="utf-8")
    jobs = {"output": "a"}, {"output": "b", "calibration": "broken.jsonl"}, {"output": "c"}
    write_jobs(path, defaults, *jobs)
    found = run_batch(path, "--fail-fast", code=1)
    assert [job["status"] for job in found] == ["written, not run", "failed", "not run"]
    found = run_batch(path, code=1)
    assert [job["status"] for job in found] == ["done", "failed", "done"]
    assert commands(path, "a") == ["prune", "eval", "card"]
    assert "evaluated together with a: see a.log" in log_of(path, "c")


def test_a_report_alone_and_one_without_a_card(defaults, path, tmp_path):
    without = {key: value for key, value in defaults.items() if key != "eval"}
    write_jobs(
        path,
        without,
        {"output": "a", "report": True, "keep": [4, 6]},
        {"output": "b", "eval": "held-out.npy", "card": False, "keep": 6},
        {"output": "c", "base-model": "org/Tiny@v1"},
    )
    run_batch(path)
    assert [p.name for p in sorted(tmp_path.glob("*.html"))] == [f"a-{k}.html" for k in KEEPS]
    assert commands(path, "b") == ["compact", "eval"]
    assert not (tmp_path / "b" / "reap" / "eval.json").exists()
    assert "base_model: org/Tiny" in (tmp_path / "c" / "README.md").read_text(encoding="utf-8")


def test_steps_are_checked_before_the_first_job_starts(defaults, path, monkeypatch, capsys):
    monkeypatch.setattr(checking_steps, "get_token", lambda: None)
    (path.parent / "there.html").write_text("mine", encoding="utf-8")
    write_jobs(
        path,
        defaults,
        {"output": "a", "eval": "missing.npy"},
        {"output": "b", "eval": {"text": "held-out.npy", "device": "toaster"}},
        {"output": "c", "report": "there.html"},
        {"output": "d", "report": "page.pdf"},
        {"output": "e", "base-model": "nobody"},
        {"output": "f", "upload": "no-namespace"},
        {"output": "g", "upload": "me/{model}"},
        {"output": "h", "eval": {"text": "held-out.npy", "map": "nothing"}},
        {"output": "i", "calibration": "held-out.npy"},
    )
    assert main(["batch", str(path)]) == 2
    said = capsys.readouterr().err
    expected = {
        "a": "eval SPEC 'missing.npy': there is no file missing.npy",
        "b": "toaster",
        "c": "exists already",
        "d": "ends in .html",
        "e": "no id on the Hub",
        "f": "say whose repository",
        "g": "there is no token",
        "h": "--map",
    }
    for name, message in expected.items():
        line = next(line for line in said.splitlines() if f"job {name!r}:" in line)
        assert message in line
    assert "job 'i':" not in said
    assert not (path.parent / "jobs.reap-batch").exists()
    write_jobs(path, defaults, {"output": "i", "calibration": "held-out.npy"})
    assert main(["batch", str(path), "--dry-run"]) == 0
    assert "which it is calibrated on too" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_jobs(path, defaults, {"output": "a", "report": True})
    assert main(["batch", str(path)]) == 2
    assert "need matplotlib" in capsys.readouterr().err
