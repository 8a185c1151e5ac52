"""Jobs on a model of the Hub: what is refused is refused before shards are fetched."""

from __future__ import annotations

import pytest

from reap_stream.cli import main
from reap_stream.errors import ReadError
from reap_stream.hub.provider import HubProvider
from tests.hub_server import serving
from tests.model_hub_client import point_at

NAME = "org/worked-on-moe"
RUN = ("--device", "cpu", "--compute-dtype", "float32")
HINT = "The same command with --resume goes on."


@pytest.fixture(scope="module")
def source(tiny):
    return tiny("glm4_moe", num_nextn_predict_layers=0)


@pytest.fixture
def hub(monkeypatch, tmp_path, source):
    with serving() as server:
        server.add(NAME, source)
        point_at(monkeypatch, server.url, tmp_path / "cache")
        yield server


@pytest.fixture
def prune(hub, calibration, tmp_path):
    """Prunes the model to `tmp_path / "out"`."""

    def call(*more):
        options = ["--keep", "4", "--calibration", calibration[0], *RUN, *more]
        return main(["prune", NAME, "--output", str(tmp_path / "out"), *options])

    return call


@pytest.fixture
def observe(hub, calibration, tmp_path):
    """Scores a model; where the scores are."""

    def call(model, *more):
        scores = tmp_path / "scores.safetensors"
        options = ["--output", str(scores), "--calibration", calibration[0], *RUN]
        assert main(["observe", str(model), *options, *more]) == 0
        hub.forget()
        return scores

    return call


@pytest.fixture
def sent_for(monkeypatch):
    """The shards that are sent for, from then on."""
    names = []
    send = HubProvider._send_for

    def note(provider, file, **options):
        names.append(file.name)
        send(provider, file, **options)

    monkeypatch.setattr(HubProvider, "_send_for", note)
    return names


def compact(model, scores, output, *more):
    arguments = ["--scores", str(scores), "--keep", "4", "--output", str(output)]
    return main(["compact", str(model), *arguments, *more])


def test_evict_does_not_go_with_protection(hub, prune, capsys):
    assert prune("--evict", "--protect", "super") == 2
    assert "give observe --evict, then compact --protect super" in capsys.readouterr().err
    assert not hub.requests


def test_what_is_advised_instead_goes(observe, tmp_path):
    scores = observe(NAME, "--evict", "--protect", "super")
    assert compact(NAME, scores, tmp_path / "out", "--protect", "super") == 0


@pytest.mark.parametrize(
    ("place", "end"),
    [("prepare_run", "try again"), ("LayerPass.run", f"try again. {HINT}")],
    ids=["before the job", "in the job"],
)
def test_resume_is_named_where_there_is_a_job(prune, capsys, monkeypatch, place, end):
    def fail(*_):
        raise ReadError("the connection did not hold: try again")

    monkeypatch.setattr(f"reap_stream.pipeline.{place}", fail)
    assert prune() == 1
    assert capsys.readouterr().err.endswith(f"the connection did not hold: {end}\n")


def test_a_refused_job_has_fetched_nothing(observe, sent_for, tmp_path, capsys):
    scores = observe(NAME, "--evict")
    sent_for.clear()
    assert compact(NAME, scores, tmp_path / "out", "--resume") == 2
    assert "no half-done job to resume" in capsys.readouterr().err
    assert not sent_for


def test_a_refused_verification_has_fetched_nothing(prune, sent_for, tmp_path, capsys):
    assert prune("--evict") == 0
    assert sent_for
    sent_for.clear()
    (tmp_path / "out" / "reap" / "kept_experts.json").write_text("{}", encoding="utf-8")
    assert main(["verify", str(tmp_path / "out"), "--source", NAME]) != 0
    assert "kept_experts.json" in capsys.readouterr().err
    assert not sent_for


def test_scores_of_the_hub_and_of_a_directory(source, observe, sent_for, tmp_path, capsys):
    """The same files have two fingerprints, and what is refused says which to give."""
    assert compact(source, observe(NAME, "--evict"), tmp_path / "out") == 2
    assert (
        "taken on a model of the Hub need its id here, not a directory" in capsys.readouterr().err
    )
    scores = observe(source, "--overwrite")
    sent_for.clear()
    assert compact(NAME, scores, tmp_path / "out") == 2
    assert "taken on a directory need that directory here" in capsys.readouterr().err
    assert not sent_for
