"""`--mtp score` through the whole of every job: plan, prune, observe, compact, merge, resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from reap_stream.cli import main
from reap_stream.errors import UnsupportedError
from reap_stream.model.transformers_api import mtp as transformers_mtp
from reap_stream.scoring.scores_file import load_scores
from reap_stream.verifying import verify_directory
from tests.builders import add_mtp, load_tensors, read_config, write_checkpoint
from tests.engine import prune_to, read_kept, read_scores
from tests.killing import count_steps
from tests.resuming import contents, kill_and_resume, prune_arguments

KEEP = 4
MTP = 3


@pytest.fixture(scope="session")
def source(tiny, tmp_path_factory):
    return add_mtp(tiny("glm4_moe"), tmp_path_factory.mktemp("mtp"), "nextn")


@pytest.fixture(scope="session")
def foreign(tiny, tmp_path_factory):
    """Prediction layers that transformers' model of them has no place for."""
    source = add_mtp(tiny("glm4_moe"), tmp_path_factory.mktemp("mtp"), "nextn")
    tensors = load_tensors(source)
    tensors["model.layers.3.twist.weight"] = torch.zeros(32, 32)
    return write_checkpoint(tmp_path_factory.mktemp("foreign"), tensors, read_config(source))


def run(*arguments):
    return main([str(argument) for argument in arguments])


def calibrated(calibration):
    options = [part for spec in calibration for part in ("--calibration", spec)]
    return [*options, "--device", "cpu", "--compute-dtype", "float32", "--batch-tokens", "72"]


def test_it_is_the_default(source, calibration, tmp_path):
    named = prune_to(tmp_path / "named", source, calibration, KEEP, mtp="score")
    silent = prune_to(tmp_path / "silent", source, calibration, KEEP)
    assert read_kept(named) == read_kept(silent)
    assert f"layers.{MTP}.tokens" in read_scores(silent)
    matched = prune_to(tmp_path / "matched", source, calibration, KEEP, mtp="match")
    assert read_kept(matched)[MTP] != read_kept(named)[MTP]
    assert f"layers.{MTP}.tokens" not in read_scores(matched)
    card = (silent / "README.md").read_text(encoding="utf-8")
    assert "[3] were scored and pruned by their own routing" in card


def test_what_cannot_be_run_matches_and_says_so(foreign, calibration, tmp_path, capsys):
    arguments = ["prune", foreign, *calibrated(calibration), "--keep", KEEP]
    assert run(*arguments, "--output", tmp_path / "out") == 0
    assert "no place for tensor 'model.layers.3.twist.weight'" in capsys.readouterr().err
    kept = read_kept(tmp_path / "out")
    assert kept[MTP] == kept[MTP - 1]
    record = json.loads((tmp_path / "out" / "reap" / "run.json").read_text(encoding="utf-8"))
    assert record["mtp"]["choice"] == record["settings"]["mtp"] == "match"
    assert "model.layers.3.twist.weight" in record["mtp"]["notes"][0]
    verify_directory(tmp_path / "out", foreign)


def test_what_cannot_be_run_is_refused_where_it_was_asked_for(foreign, calibration, tmp_path):
    with pytest.raises(UnsupportedError, match=r"--mtp score: .*twist.*; --mtp match"):
        prune_to(tmp_path / "out", foreign, calibration, KEEP, mtp="score")
    assert not list(tmp_path.iterdir())


def test_plan_says_what_prune_will_do(source, foreign, capsys):
    def planned(checkpoint, *options):
        assert run("plan", checkpoint, "--keep", KEEP, "--json", *options) == 0
        return json.loads(capsys.readouterr().out)["variants"][0]["warnings"]

    assert not any("prediction" in warning for warning in planned(source))
    assert any("(--mtp match)" in warning for warning in planned(foreign))
    assert any("llama.cpp" in warning for warning in planned(source, "--mtp", "keep"))
    assert run("plan", foreign, "--keep", KEEP, "--mtp", "score") == 2
    assert "twist" in capsys.readouterr().err


def test_plan_counts_its_memory(source, tmp_path, capsys):
    """A prediction layer that is larger than any decoder layer raises the peak."""
    wide = {
        name: tensor.float() if name.startswith("model.layers.3.") else tensor.bfloat16()
        for name, tensor in load_tensors(source).items()
    }
    mixed = write_checkpoint(tmp_path / "mixed", wide, read_config(source))
    peaks = []
    for mtp in ("score", "match"):
        arguments = ["--keep", KEEP, "--json", "--mtp", mtp, "--samples", 1, "--memory", "64GiB"]
        assert run("plan", mixed, *arguments, "--compute-dtype", "float32") == 0
        peaks.append(json.loads(capsys.readouterr().out)["variants"][0]["peak_host_bytes"])
    assert peaks[0] > peaks[1]


def test_an_older_transformers_matches(source, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_mtp, "MtpModel", None)
    output = prune_to(tmp_path / "out", source, calibration, KEEP)
    kept = read_kept(output)
    assert kept[MTP] == kept[MTP - 1]
    record = json.loads((output / "reap" / "run.json").read_text(encoding="utf-8"))
    assert "runs no next-token-prediction layers" in record["mtp"]["notes"][0]
    with pytest.raises(UnsupportedError, match="runs no next-token-prediction layers"):
        prune_to(tmp_path / "asked", source, calibration, KEEP, mtp="score")


def test_a_layer_that_cannot_be_called_is_found_before_the_work(source, monkeypatch, tmp_path):
    def broken(*_):
        message = "missing indexer"
        raise TypeError(message)

    monkeypatch.setattr("reap_stream.model.mtp_inputs.mtp_layer_arguments", broken)
    with pytest.raises(UnsupportedError, match="missing indexer"):
        prune_to(tmp_path / "out", source, ("builtin:1",), KEEP, mtp="score")
    assert not list(tmp_path.iterdir())


def test_positions_without_a_token_to_come_do_not_count(tiny, calibration, tmp_path):
    """Each layer lacks one token more at the end of a row; rows of two have none for the second."""
    source = add_mtp(tiny("glm4_moe"), tmp_path / "source", "nextn", 2)
    np.save(tmp_path / "pairs.npy", np.arange(4, 40).reshape(18, 2))
    specs = (*calibration, str(tmp_path / "pairs.npy"))
    scores = read_scores(prune_to(tmp_path / "out", source, specs, KEEP))
    shapes = [np.load(spec).shape for spec in specs]
    for layer, lacking in ((MTP - 1, 0), (MTP, 1), (MTP + 1, 2)):
        tokens = scores[f"layers.{layer}.tokens"].sum(axis=1)
        assert tokens.tolist() == [2 * rows * (width - lacking) for rows, width in shapes]


@pytest.mark.parametrize("options", [{"batch_tokens": 24}, {"memory": 3 * 2**30}])
def test_batches_and_memory_do_not_change_it(options, source, calibration, tmp_path):
    one = read_scores(prune_to(tmp_path / "one", source, calibration, KEEP))
    other = read_scores(prune_to(tmp_path / "other", source, calibration, KEEP, **options))
    for field in ("tokens", "gate_norm_sum"):
        name = f"layers.{MTP}.{field}"
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5)


@pytest.mark.parametrize("options", [[], ["--propagate", "pruned"]], ids=["original", "pruned"])
def test_killed_it_resumes_to_the_same_bytes(options, source, calibration, tmp_path):
    def arguments(output):
        made = prune_arguments(source, output, calibration, *options, "--snapshot-minutes", "0")
        return list(map(str, made))

    whole = tmp_path / "whole"
    total = count_steps(arguments(whole), tmp_path / "log")
    expected = contents(whole)
    # From the last decoder layers on: what lies before is in the tests of resuming.
    for step in range(total // 2, total + 1, 5):
        output = tmp_path / f"killed-{step}"
        kill_and_resume(arguments(output), output, expected, step)


def test_observed_scores_compact_to_what_prune_writes(source, calibration, tmp_path):
    scores = tmp_path / "scores.safetensors"
    assert run("observe", source, "--output", scores, *calibrated(calibration)) == 0
    assert MTP in load_scores(scores).layers
    for output, options in (("compact", []), ("named", ["--mtp", "score"])):
        arguments = ["compact", source, "--scores", scores, "--output", tmp_path / output]
        assert run(*arguments, "--keep", KEEP, *options) == 0
    pruned = prune_to(tmp_path / "pruned", source, calibration, KEEP)
    for output in ("compact", "named"):
        assert read_kept(tmp_path / output) == read_kept(pruned)
        found, expected = load_tensors(tmp_path / output), load_tensors(pruned)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_scores_without_it_are_refused_unless_told(source, calibration, tmp_path, capsys):
    pruned = prune_to(tmp_path / "pruned", source, calibration, KEEP, mtp="match")
    scores = pruned / "reap" / "scores.safetensors"
    arguments = ["compact", source, "--scores", scores, "--keep", KEEP, "--output"]
    for options in ([], ["--mtp", "score"]):
        assert run(*arguments, tmp_path / "out", *options) == 2
        said = capsys.readouterr().err
        assert "no scores of next-token-prediction layer 3" in said
        assert "--mtp match" in said
    assert not (tmp_path / "out").exists()
    assert run(*arguments, tmp_path / "out", "--mtp", "match") == 0
    assert read_kept(tmp_path / "out") == read_kept(pruned)


def test_scores_of_what_cannot_be_run_match(foreign, calibration, tmp_path, capsys):
    scores = tmp_path / "scores.safetensors"
    assert run("observe", foreign, "--output", scores, *calibrated(calibration)) == 0
    assert "they have no scores" in capsys.readouterr().err
    assert MTP not in load_scores(scores).layers
    arguments = ["compact", foreign, "--scores", scores, "--output", tmp_path / "out"]
    assert run(*arguments, "--keep", KEEP) == 0
    assert "(--mtp match)" in capsys.readouterr().err
    kept = read_kept(tmp_path / "out")
    assert kept[MTP] == kept[MTP - 1]


def test_merged_scores_keep_it(source, calibration, tmp_path):
    parts = []
    for number, spec in enumerate(calibration[:2]):
        parts.append(tmp_path / f"{number}.safetensors")
        assert run("observe", source, "--output", parts[-1], *calibrated([spec])) == 0
    merged = tmp_path / "merged.safetensors"
    assert run("merge", *parts, "--output", merged) == 0
    both = tmp_path / "both.safetensors"
    assert run("observe", source, "--output", both, *calibrated(calibration[:2])) == 0
    found, expected = load_scores(merged).layers[MTP], load_scores(both).layers[MTP]
    assert np.array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.gate_norm_sum, expected.gate_norm_sum, rtol=1e-5)


def test_scores_with_and_without_it_do_not_merge(source, calibration, tmp_path, capsys):
    with_it = prune_to(tmp_path / "score", source, calibration, KEEP)
    without = prune_to(tmp_path / "match", source, calibration, KEEP, mtp="match")
    parts = [directory / "reap" / "scores.safetensors" for directory in (with_it, without)]
    assert run("merge", *parts, "--output", tmp_path / "merged.safetensors") != 0
    assert "MoE layers is [1, 2], not [1, 2, 3]" in capsys.readouterr().err
