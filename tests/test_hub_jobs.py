"""Jobs on a model of the Hub: what is refused is refused before shards are fetched."""

from __future__ import annotations

import shutil

import pytest
import torch

from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.cli import main
from reap_stream.errors import ReadError
from reap_stream.scoring.scores_file import load_scores
from tests.builders import load_tensors, quantise, read_config, write_checkpoint

NAME = "org/worked-on-moe"
SHARD = "model.safetensors"
RUN = ("--device", "cpu", "--compute-dtype", "float32")
HINT = "The same command with --resume goes on."


@pytest.fixture(scope="module")
def source(tiny):
    return tiny("glm4_moe", num_nextn_predict_layers=0)


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


def test_scores_of_the_hub_fit_a_directory_with_the_same_files(
    source, observe, prune, tmp_path, capsys
):
    """One byte in a shard tells another model apart, wherever it lies."""
    scores = observe(NAME, "--evict")
    assert load_scores(scores).metadata["taken_on"].startswith(f"{NAME}@")
    assert compact(source, scores, tmp_path / "local") == 0
    assert prune("--evict") == 0
    for name in ("model-00001-of-00001.safetensors", "reap/kept_experts.json"):
        expected = (tmp_path / "out" / name).read_bytes()
        assert (tmp_path / "local" / name).read_bytes() == expected
    # What it writes is the directory's own: it can be used there without another look.
    own = tmp_path / "local" / "reap" / "scores.safetensors"
    assert load_scores(own).model_fingerprint == open_checkpoint(source).fingerprint
    assert "taken_on" not in load_scores(own).metadata
    texts = ["--text", str(tmp_path / "text.txt"), "--scores", str(scores), "--keep", "4"]
    (tmp_path / "text.txt").write_text("1", encoding="utf-8")
    other = shutil.copytree(source, tmp_path / "other")
    shard = bytearray((other / SHARD).read_bytes())
    shard[-1] ^= 1
    (other / SHARD).write_bytes(shard)
    capsys.readouterr()
    for line in (["compact", "--output", str(tmp_path / "no"), *texts[2:]], ["eval", *texts]):
        assert main([line[0], str(other), *line[1:]]) == 2
        assert f"taken on {NAME}@" in (said := capsys.readouterr().err)
        assert "whose files are others" in said


def test_scores_of_a_directory_do_not_fit_the_hub(source, observe, sent_for, tmp_path, capsys):
    """Its samples cannot be had without the shards, so what is refused says which to give."""
    scores = observe(source)
    sent_for.clear()
    assert compact(NAME, scores, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "taken on a directory need that directory here, or one with the same files" in said
    assert not sent_for


@pytest.fixture(scope="module")
def with_static_scales(tiny, tmp_path_factory):
    """A checkpoint in FP8 in which each expert has a static scale of its input."""
    folder = tmp_path_factory.mktemp("static")
    stored, _ = quantise(tiny("glm4_moe", num_nextn_predict_layers=0), folder, "tensor")
    tensors, config = load_tensors(stored), read_config(stored)
    for name in [name for name in tensors if ".experts." in name and name.endswith(".weight")]:
        tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.5)
    config["quantization_config"]["activation_scheme"] = "static"
    return write_checkpoint(folder / "scales", tensors, config)


def test_static_scales_are_read_again_so_their_shards_are_not_deleted(
    hub, prune, observe, with_static_scales, sent_for, tmp_path, capsys
):
    hub.add(NAME, with_static_scales)
    scores = observe(NAME, "--evict")
    sent_for.clear()
    assert prune("--evict") == 2
    assert compact(NAME, scores, tmp_path / "out", "--evict") == 2
    assert capsys.readouterr().err.count("is a static activation scale, and those of all") == 2
    assert not sent_for
    assert compact(NAME, scores, tmp_path / "out") == 0
    assert main(["verify", str(tmp_path / "out"), "--source", NAME, "--evict"]) == 0
