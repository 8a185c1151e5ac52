"""Scores of the same model in other weights: taken when told so, on record, and never by themselves."""

from __future__ import annotations

import pytest

from reap_stream.cli import main
from tests.builders import load_tensors, quantise, read_config, write_checkpoint
from tests.engine import read_kept, run_record

KEEP = 4
FLAG = "--scores-of-other-weights"


def command(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def stored(tiny, tmp_path_factory):
    """A model in FP8, and the same values in float32."""
    return quantise(tiny("glm4_moe"), tmp_path_factory.mktemp("stored"), "channel")


@pytest.fixture(scope="module")
def scores(stored, calibration, tmp_path_factory):
    """Taken on the float32 one."""
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    specs = [word for spec in calibration for word in ("--calibration", spec)]
    assert command("observe", stored[1], "--output", path, *specs) == 0
    return path


def compact(model, scores, output, *more):
    return command("compact", model, "--scores", scores, "--output", output, "--keep", KEEP, *more)


def test_they_choose_the_same_experts(stored, scores, tmp_path, capsys):
    quantised, plain = stored
    assert compact(quantised, scores, tmp_path / "no") == 2
    assert FLAG in capsys.readouterr().err
    assert compact(quantised, scores, tmp_path / "fp8", FLAG) == 0
    assert "the scores are of other weights (fingerprint" in capsys.readouterr().err
    assert command("verify", tmp_path / "fp8", "--source", quantised) == 0
    assert compact(plain, scores, tmp_path / "plain") == 0
    assert read_kept(tmp_path / "fp8") == read_kept(tmp_path / "plain")


def test_it_is_on_record(stored, scores, tmp_path):
    assert compact(stored[0], scores, tmp_path / "fp8", FLAG) == 0
    # Where they are of these weights there is nothing to say, though it was allowed.
    assert compact(stored[1], scores, tmp_path / "plain", FLAG) == 0
    plain = run_record(tmp_path / "plain")
    assert "scores_of_other_weights" not in plain["settings"]
    taken_on = plain["source"]["fingerprint"]
    assert run_record(tmp_path / "fp8")["settings"]["scores_of_other_weights"] == taken_on
    cards = [
        (tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("fp8", "plain")
    ]
    assert f"scores of other weights than these (fingerprint `{taken_on[:12]}`)" in cards[0]
    assert [f"\n  {FLAG}" in card for card in cards] == [True, False]


def test_weights_that_cannot_be_decoded_are_written_by_them(stored, scores, tmp_path, capsys):
    def unknown(name):
        return f"{name}_of_no_known_format" if name.endswith("_proj.weight") else name

    tensors = {unknown(name): tensor for name, tensor in load_tensors(stored[1]).items()}
    source = write_checkpoint(tmp_path / "unknown", tensors, read_config(stored[1]))
    assert command("plan", source, "--keep", KEEP) == 0
    assert "compact works with scores of the model in another format" in capsys.readouterr().out
    assert compact(source, scores, tmp_path / "out", FLAG) == 0
    assert command("verify", tmp_path / "out", "--source", source) == 0


def test_they_must_be_of_as_many_experts_and_the_same_layers(tiny, scores, tmp_path, capsys):
    for other in (tiny("glm4_moe", n_routed_experts=16), tiny("glm4_moe", num_hidden_layers=5)):
        assert compact(other, scores, tmp_path / "out", FLAG) == 2
        assert "scores of 2 layers of 8 experts, the model has" in capsys.readouterr().err
        # Nothing would help, so nothing is offered.
        assert compact(other, scores, tmp_path / "out") == 2
        assert FLAG not in capsys.readouterr().err
