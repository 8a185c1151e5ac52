"""Batches over models on the Hub: one commit of each, fetched once, or again where it is evicted."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from reap_stream.cli import main
from tests.batches import DEFAULTS, run_batch, states, stay_in_process, write_jobs
from tests.engine import prune_to
from tests.hub_server import serving
from tests.model_hub_client import point_at

NAME = "org/tiny-moe"


@pytest.fixture(scope="module")
def source(tiny):
    """A checkpoint of several shards."""
    return tiny("glm4_moe", max_shard_size="60KB")


@pytest.fixture
def hub(monkeypatch, tmp_path, source):
    """A server that has the checkpoint, and an empty cache."""
    stay_in_process(monkeypatch)
    with serving() as server:
        server.commit = server.add(NAME, source)
        point_at(monkeypatch, server.url, tmp_path / "cache")
        yield server


@pytest.fixture
def defaults(calibration):
    return {**DEFAULTS, "model": NAME, "calibration": list(calibration)}


def shards(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def assert_as_from_a_directory(output, source, calibration, **options):
    alone = output.with_name("alone")
    shutil.rmtree(alone, ignore_errors=True)
    prune_to(alone, source, calibration, batch_tokens=72, max_shard_nbytes=40_000, **options)
    assert shards(output) == shards(alone)


def fetched(hub):
    """How often each shard was fetched whole; headers are read by ranges."""
    whole = [request for request in hub.asked("GET", ".safetensors") if request.range is None]
    names = [request.path.rpartition("/")[2] for request in whole if request.status == 200]
    return {name: names.count(name) for name in names}


def commits(path, name):
    log = (path.parent / "jobs.reap-batch" / f"{name}.log").read_text(encoding="utf-8")
    lines = [line for line in log.splitlines() if line.startswith("$ ")]
    return [part.partition("@")[2] for line in lines for part in line.split() if NAME in part]


def test_jobs_of_one_model_fetch_it_once_and_stay_at_its_commit(
    hub, defaults, source, calibration, tmp_path, tiny
):
    np.save(tmp_path / "held-out.npy", np.arange(12).reshape(1, 12))
    more = {"verify": True, "eval": "held-out.npy"}
    path = write_jobs(
        tmp_path / "jobs.toml",
        {**defaults, **more},
        {"output": "{model}-{method}", "method": ["reap", "ean"]},
    )
    jobs = run_batch(path)
    first, second = "tiny-moe-reap", "tiny-moe-ean"
    assert states(jobs) == [(first, "done", "prune"), (second, "done", "compact")]
    # For both jobs, their comparison and their evaluation.
    assert fetched(hub) == dict.fromkeys(shards(source), 1)
    assert {job["model"] for job in jobs} == {f"{NAME}@{hub.commit}"}
    for method in ("reap", "ean"):
        assert_as_from_a_directory(
            tmp_path / f"tiny-moe-{method}", source, calibration, method=method
        )
    # The branch goes on: what is added to the batch is of the commit that it was begun with.
    old = hub.commit
    hub.move(NAME, tiny("glm4_moe", max_shard_size="70KB"))
    path.write_text(path.read_text(encoding="utf-8") + '\n[[job]]\noutput = "late"\nkeep = 6\n')
    jobs = run_batch(path)
    expected = [(first, "skipped", ""), (second, "skipped", ""), ("late", "done", "compact")]
    assert states(jobs) == expected
    assert set(commits(path, "late")) == {old}
    assert_as_from_a_directory(tmp_path / "late", source, calibration, keep=6)


def test_evicted_models_are_fetched_again_and_leave_nothing(
    hub, defaults, source, calibration, tmp_path, capsys
):
    np.save(tmp_path / "held-out.npy", np.arange(12).reshape(1, 12))
    path = write_jobs(
        tmp_path / "jobs.toml",
        {**defaults, "model": f"{NAME}@main", "evict": True},
        {"output": "a", "verify": True},
        {"output": "b", "method": "ean", "eval": "held-out.npy"},
    )
    jobs = run_batch(path)
    assert states(jobs) == [("a", "done", "prune"), ("b", "done", "compact")]
    said = capsys.readouterr().err
    assert "job 'a': evict deletes what was fetched behind its use" in said
    assert f"{NAME}@{hub.commit} is fetched again: after job 'a', for eval" in said
    # By prune and verify of a, compact and eval of b.
    assert fetched(hub) == dict.fromkeys(shards(source), 4)
    assert not list((tmp_path / "cache").rglob("snapshots/*/*.safetensors"))
    assert not list(tmp_path.rglob("*.reap-source*"))
    assert_as_from_a_directory(tmp_path / "a", source, calibration)
    assert_as_from_a_directory(tmp_path / "b", source, calibration, method="ean")
    assert states(run_batch(path)) == [("a", "skipped", ""), ("b", "skipped", "")]


def test_models_that_cannot_be_had_are_refused_together(hub, defaults, tmp_path, capsys):
    path = write_jobs(
        tmp_path / "jobs.toml",
        defaults,
        {"output": "good"},
        {"output": "b", "model": "org/nowhere"},
        {"output": "c", "model": f"{NAME}@nothing"},
        {"output": "d", "evict": True, "protect": "super"},
    )
    text = path.read_text(encoding="utf-8")
    assert main(["batch", str(path)]) == 2
    assert "protect chooses experts when all layers are scored" in capsys.readouterr().err
    path.write_text(text.replace('protect = "super"', ""), encoding="utf-8")
    (tmp_path / ".d.reap-source").mkdir()
    (tmp_path / ".d.reap-source" / "mine").write_text("mine")
    assert main(["batch", str(path)]) == 2
    said = capsys.readouterr().err
    for name, message in {
        "b": "org/nowhere",
        "c": "nothing",
        "d": "none of this package's",
    }.items():
        line = next(line for line in said.splitlines() if f"job {name!r}:" in line)
        assert message in line
    assert "job 'good'" not in said
    assert not fetched(hub)
