"""What cannot be compared is refused before a layer is read, and the message says why."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from reap_stream.errors import CalibrationError, ForwardError, UsageError
from reap_stream.evaluating import evaluate
from reap_stream.forward import ForwardPass
from reap_stream.settings import Candidate, ChoiceSettings, EvalSettings
from tests.builders import load_tensors, read_config, write_checkpoint
from tests.engine import prune_to
from tests.evaluation import eval_settings, make_scores


@pytest.fixture
def reads_layers():
    """Marks a test in which layers are read."""


@pytest.fixture(autouse=True)
def no_layer(request, monkeypatch):
    """No layer is read, but where a test says that it must be."""
    if "reads_layers" in request.fixturenames:
        return

    def refuse(self, *arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(ForwardPass, "layer", refuse)


@pytest.fixture
def scores(tiny, tmp_path):
    return make_scores(tiny("deepseek_v3"), tmp_path / "scores.safetensors")


TARGETS = [
    pytest.param({"keep": 9}, "cannot keep 9 of 8 experts", id="more-than-there-are"),
    pytest.param({"keep": 3}, "do not divide into the router's 2 groups", id="groups"),
    pytest.param({"keep": 2}, "keep at least 4", id="fewer-than-the-router-needs"),
    pytest.param({"sparsity": "1"}, "out of range", id="everything"),
    pytest.param({"sparsity": "0.2,0.4"}, "is no number", id="two-in-one"),
    pytest.param({"keep": 4, "choice": ChoiceSettings("best")}, "best", id="criterion"),
    pytest.param(
        {"keep": 4, "choice": ChoiceSettings(source_weights=(("no", 2.0),))}, "'no'", id="source"
    ),
]


@pytest.mark.parametrize(("options", "match"), TARGETS)
def test_targets_that_cannot_be(options, match, tiny, calibration, scores):
    candidates = (Candidate(scores, **options),)
    with pytest.raises(UsageError, match=match):
        evaluate(eval_settings([tiny("deepseek_v3")], calibration, candidates=candidates))


def test_scores_of_another_model(tiny, calibration, scores, tmp_path):
    source = tiny("glm4_moe")
    settings = eval_settings([source], calibration, candidates=(Candidate(scores, 4),))
    with pytest.raises(UsageError, match="taken on another model"):
        evaluate(settings)
    missing = Candidate(tmp_path / "missing.safetensors", 4)
    with pytest.raises(CalibrationError, match=r"missing\.safetensors"):
        evaluate(eval_settings([source], calibration, candidates=(missing,)))


def test_the_same_candidate_twice(tiny, calibration, scores):
    twice = (Candidate(scores, 4), Candidate(scores, sparsity="0.5"))
    with pytest.raises(UsageError, match="two candidates are called 'reap keep 4'"):
        evaluate(eval_settings([tiny("deepseek_v3")], calibration, candidates=twice))


def test_settings_that_say_nothing_or_too_much(tmp_path):
    with pytest.raises(UsageError, match="no model"):
        EvalSettings(models=(), text=("builtin",))
    with pytest.raises(UsageError, match="no text"):
        EvalSettings(models=(tmp_path,), text=())
    with pytest.raises(UsageError, match="given twice"):
        EvalSettings(models=(tmp_path, tmp_path), text=("builtin",))
    for options in ({}, {"keep": 4, "sparsity": "0.5"}):
        with pytest.raises(UsageError, match="either keep or sparsity"):
            Candidate(tmp_path, **options)


def test_text_in_which_nothing_is_predicted(tiny, calibration, tmp_path):
    path = tmp_path / "short.npy"
    np.save(path, np.array([[5], [6]]))
    with pytest.raises(CalibrationError, match=r"holds no row of at least 2 tokens"):
        evaluate(eval_settings([tiny("glm4_moe")], [*calibration, str(path)], sequence_length=9))


def test_vocabularies_of_different_length(tiny, calibration):
    models = [tiny("glm4_moe"), tiny("glm4_moe", vocab_size=97)]
    with pytest.raises(UsageError, match=r"a vocabulary of 97 tokens, that of .* has 96"):
        evaluate(eval_settings(models, calibration))


VOCABULARY = {"a": 0, "b": 1}


def with_tokenizers(source, directory, first, second):
    """Two checkpoints alike but for their tokenizer.json."""
    models = []
    for name, document in (("first", first), ("second", second)):
        path = directory / name
        shutil.copytree(source, path)
        (path / "tokenizer.json").write_text(document)
        models.append(path)
    return models


def test_different_tokenizers(tiny, calibration, tmp_path):
    other = {"model": {"vocab": {"a": 1, "b": 0}}}
    mine = json.dumps({"model": {"vocab": VOCABULARY}})
    models = with_tokenizers(tiny("glm4_moe"), tmp_path, mine, json.dumps(other))
    with pytest.raises(UsageError, match=r"second/tokenizer\.json differs from .*first/tokenizer"):
        evaluate(eval_settings(models, calibration))


@pytest.mark.usefixtures("reads_layers")
def test_tokenizers_that_are_only_written_in_another_way(tiny, calibration, tmp_path):
    mine = json.dumps({"model": {"vocab": VOCABULARY}, "truncation": None})
    theirs = json.dumps({"truncation": {"max_length": 9}, "model": {"vocab": VOCABULARY}}, indent=1)
    models = with_tokenizers(tiny("glm4_moe"), tmp_path, mine, theirs)
    found = evaluate(eval_settings(models, calibration)).results
    assert found[0].all == found[1].all


@pytest.mark.usefixtures("reads_layers")
def test_a_tokenizer_that_cannot_be_compared_is_noted(tiny, calibration, tmp_path):
    mine = json.dumps({"model": {"vocab": VOCABULARY}})
    first, second = with_tokenizers(tiny("glm4_moe"), tmp_path, mine, mine)
    notes = evaluate(eval_settings([first, second], calibration)).notes
    assert not any("tokenizer" in note for note in notes)
    (second / "tokenizer.json").unlink()
    notes = evaluate(eval_settings([first, second], calibration)).notes
    assert any(f"{second}: has no tokenizer file" in note for note in notes)


@pytest.mark.usefixtures("reads_layers")
@pytest.mark.parametrize("guilty", [0, 1])
def test_hidden_states_that_are_no_numbers(guilty, tiny, calibration, tmp_path):
    models = with_tokenizers(tiny("glm4_moe"), tmp_path, "{}", "{}")
    name = "model.layers.1.input_layernorm.weight"
    tensors = load_tensors(models[guilty])
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    shutil.rmtree(models[guilty])
    write_checkpoint(models[guilty], tensors, read_config(models[1 - guilty]))
    label = models[guilty].name
    with pytest.raises(ForwardError, match=f"^{label}: the hidden states behind layer 1 are not"):
        evaluate(eval_settings(models, calibration))


@pytest.mark.usefixtures("reads_layers")
def test_predictions_that_are_no_numbers(tiny, calibration, tmp_path):
    source = tiny("glm4_moe")
    pruned = prune_to(tmp_path / "pruned", source, calibration, 4)
    tensors = load_tensors(pruned)
    tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], torch.nan)
    damaged = write_checkpoint(tmp_path / "damaged", tensors, read_config(pruned))
    with pytest.raises(ForwardError, match="damaged: logits of token 0"):
        evaluate(eval_settings([source, damaged], calibration))
