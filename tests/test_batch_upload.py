"""Jobs that end with upload, against a server on loopback that takes them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from reap_stream.cli import main
from tests import upload_server
from tests.batches import DEFAULTS, run_batch, states, stay_in_process, write_jobs
from tests.model_hub_client import environment
from tests.upload_server import TOKEN, Fault, remote

hub = upload_server.hub

NAMES = ("me/tiny-4", "me/tiny-6")


@pytest.fixture
def path(tiny, calibration, tmp_path, monkeypatch):
    """A batch of one job with two targets, each of which is uploaded."""
    stay_in_process(monkeypatch)
    model = str(tiny("glm4_moe"))
    defaults = {**DEFAULTS, "model": model, "calibration": list(calibration)}
    job = {"output": "a", "keep": [4, 6], "upload": "me/tiny-{keep}", "revision": "v1"}
    return write_jobs(tmp_path / "jobs.toml", defaults, job)


def commits(hub):
    return [hub.repositories[name].commits for name in NAMES if name in hub.repositories]


def commands(path):
    log = (path.parent / "jobs.reap-batch" / "a.log").read_text(encoding="utf-8")
    return [line.split()[2] for line in log.splitlines() if line.startswith("$ ")]


def test_each_checkpoint_is_uploaded_once(hub, path, tmp_path):
    (job,) = run_batch(path)
    assert (job["state"], [entry["uploaded"] for entry in job["checkpoints"]]) == (
        "done",
        [True] * 2,
    )
    for keep, name in zip((4, 6), NAMES, strict=True):
        directory = tmp_path / "a" / f"keep-{keep}"
        files = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
        assert set(remote(hub, "v1", name)) == files
        assert hub.repositories[name].private
    before = commits(hub)
    hub.forget()
    assert states(run_batch(path)) == [("a", "skipped", "")]
    assert (commits(hub), hub.requests) == (before, [])
    # Deleted to make room, it is on the Hub and not written again.
    shutil.rmtree(tmp_path / "a")
    assert states(run_batch(path)) == [("a", "skipped", "")]
    assert not (tmp_path / "a").exists()


def test_an_upload_that_fails_leaves_what_was_written_and_is_alone_tried_again(
    hub, path, tmp_path, capsys
):
    hub.faults.append(Fault("POST", "me/tiny-6/commit", 403, times=99))
    (job,) = run_batch(path, code=1)
    assert (job["state"], job["status"], job["written"]) == (
        "failed",
        "written, not uploaded",
        True,
    )
    assert [entry["uploaded"] for entry in job["checkpoints"]] == [True, False]
    assert "may not write there" in job["error"]
    assert "written, not uploaded" in capsys.readouterr().out
    hub.faults.clear()
    first = commits(hub)[0]
    (job,) = run_batch(path)
    assert (job["state"], job["how"], job["step"]) == ("done", "", "upload")
    assert commits(hub)[0] == first
    assert set(remote(hub, "v1", "me/tiny-6")) >= {"config.json", "README.md"}
    assert commands(path) == ["prune", "upload", "upload", "upload"]


@pytest.mark.slow
def test_processes_of_their_own_ask_the_hub_of_the_environment(hub, path, tmp_path, monkeypatch):
    text = path.read_text(encoding="utf-8").replace("[4, 6]", "4")
    path.write_text(text.replace("upload = ", "upload = false # "), encoding="utf-8")
    path.write_text(path.read_text(encoding="utf-8").replace('revision = "v1"', ""))
    run_batch(path)
    path.write_text(text, encoding="utf-8")
    # From here on nothing is patched: two processes check and upload.
    monkeypatch.undo()
    more = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    for key, value in environment(hub.url, tmp_path / "cache", **more).items():
        monkeypatch.setenv(key, value)
    (job,) = run_batch(path)
    assert (job["state"], job["step"]) == ("done", "upload")
    assert commits(hub) == [1]
    assert TOKEN not in (tmp_path / "jobs.reap-batch" / "a.log").read_text(encoding="utf-8")


def test_what_a_step_changes_is_uploaded_again(hub, path, tmp_path):
    run_batch(path)
    np.save(tmp_path / "held-out.npy", np.arange(12).reshape(1, 12))
    text = path.read_text(encoding="utf-8")
    path.write_text(f'{text}eval = "held-out.npy"\n', encoding="utf-8")
    hub.whoami["auth"]["accessToken"]["role"] = "read"
    assert main(["batch", str(path)]) == 2
    hub.whoami["auth"]["accessToken"]["role"] = "write"
    assert states(run_batch(path)) == [("a", "done", "")]
    assert commands(path)[3:] == ["eval", "card", "upload", "card", "upload"]
    assert "Perplexity" in remote_text(hub, "README.md") or "perplexity" in remote_text(
        hub, "README.md"
    )
    assert "reap/eval.json" in remote(hub, "v1", NAMES[0])
    assert states(run_batch(path)) == [("a", "skipped", "")]


def remote_text(hub, name):
    return remote(hub, "v1", NAMES[0])[name].decode()


def test_what_is_left_is_evaluated_where_the_rest_was_uploaded_and_deleted(
    hub, path, calibration, tmp_path
):
    jobs = path.read_text(encoding="utf-8")

    def evaluated(text):
        path.write_text(f'{jobs}eval = "{text}"\n', encoding="utf-8")
        (entry,) = run_batch(path)
        return [found["evaluation"] for found in entry["checkpoints"]]

    before = evaluated(calibration[0])
    assert all(before)
    shutil.rmtree(tmp_path / "a" / "keep-4")
    # Of two texts, figures of the one that is gone are known of one: none are shown as the other's.
    assert evaluated(calibration[1]) == [None, None]
    assert evaluated(calibration[0]) == [None, before[1]]


def test_a_token_that_may_not_write_refuses_the_batch(hub, path, capsys):
    hub.whoami["auth"]["accessToken"]["role"] = "read"
    assert main(["batch", str(path)]) == 2
    assert "job 'a': me/tiny-4: the token of me only reads" in capsys.readouterr().err
    hub.whoami["auth"]["accessToken"]["role"] = "write"
    path.write_text(path.read_text(encoding="utf-8").replace("me/tiny", "you/tiny"))
    assert main(["batch", str(path)]) == 2
    assert "may write to me, lab" in capsys.readouterr().err
    # Asked once for all targets and jobs of a namespace.
    assert len(hub.asked("GET", "whoami")) == 2
    assert not (path.parent / "a").exists()
