"""The evaluation against transformers: loss, divergence, agreement and hidden states."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from reap_stream.compaction import compact
from reap_stream.evaluating import evaluate
from reap_stream.settings import Candidate, ChoiceSettings, OutputSettings
from tests.builders import ROW_SHAPES, VOCABULARY, quantise
from tests.engine import prune_to
from tests.evaluation import eval_settings, expected_figures, make_scores, relative_errors
from tests.families import FAMILIES
from tests.oracle import Reference

KEEP = 4
# One of each kind of router, of head (scaled, capped, tied, computed in parts) and of what goes
# from layer to layer; the others are slow only because they are many.
SPREAD = {
    *("glm4_moe", "gpt_oss", "granitemoe", "cohere2_moe", "minimax", "glm_moe_dsa", "deepseek_v4"),
    *("inkling2_text", "qwen4_exp_text", "nemotron_h_omni"),
}
EVERY = [
    pytest.param(family.id, marks=() if family.id in SPREAD else pytest.mark.slow)
    for family in FAMILIES
]


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """A family's checkpoint, made-up scores, and what compact wrote by them; made once."""
    made = {}

    def make(family_id, **changes):
        key = repr((family_id, sorted(changes.items())))
        if key not in made:
            source = tiny(family_id, **changes)
            directory = tmp_path_factory.mktemp("written")
            scores = make_scores(source, directory / "scores.safetensors")
            output = OutputSettings(output=directory / "pruned", keep=str(KEEP))
            compact(source, scores, ChoiceSettings(), output)
            made[key] = source, scores, output.output
        return made[key]

    return make


def check_figures(found, expected, tolerance=1e-5):
    assert found.tokens == expected.tokens
    assert math.isclose(found.loss, expected.loss, rel_tol=tolerance)
    assert math.isclose(found.perplexity, math.exp(expected.loss), rel_tol=10 * tolerance)
    assert math.isclose(found.kl, expected.kl, rel_tol=1e-3, abs_tol=tolerance)
    assert math.isclose(found.top1_agreement, expected.top1_agreement, abs_tol=0.5 / found.tokens)


@pytest.mark.parametrize("family_id", EVERY)
def test_every_family_is_as_transformers_runs_it(
    family_id, written, calibration, rows, reference, tmp_path
):
    source, scores, pruned = written(family_id)
    settings = eval_settings([source, pruned], calibration, candidates=(Candidate(scores, KEEP),))
    first, second, third = evaluate(settings).results
    whole, smaller = reference(source), Reference(pruned, rows, torch.float32)
    check_figures(first.all, expected_figures(rows, whole.logits, whole.logits))
    check_figures(second.all, expected_figures(rows, smaller.logits, whole.logits))
    # What was never written is what is written.
    assert third.all.tokens == second.all.tokens
    for name in ("loss", "kl", "top1_agreement"):
        mine, theirs = getattr(third.all, name), getattr(second.all, name)
        assert math.isclose(mine, theirs, rel_tol=1e-6, abs_tol=1e-6), name
    np.testing.assert_allclose(list(third.layers.values()), list(second.layers.values()), rtol=1e-5)
    errors = relative_errors(smaller.states, whole.states)
    np.testing.assert_allclose(list(second.layers.values()), errors, rtol=1e-4, atol=1e-6)
    assert list(second.layers) == list(range(len(errors)))
    assert first.layers == {}


@pytest.mark.parametrize("tied", [False, True])
def test_texts_stay_apart(tied, written, calibration, rows, reference):
    source, _, pruned = written("qwen3_moe", tie_word_embeddings=tied)
    found = evaluate(eval_settings([source, pruned], calibration)).results[1]
    whole, smaller = reference(source), reference(pruned)
    first = 0
    for text, (count, _) in zip(calibration, ROW_SHAPES, strict=True):
        own = slice(first, first + count)
        first += count
        expected = expected_figures(rows[own], smaller.logits[own], whole.logits[own])
        check_figures(found.sources[text], expected)
    assert list(found.sources) == list(calibration)


@pytest.mark.parametrize(
    ("scheme", "dtype"), [("block", "float32"), ("block", "bfloat16"), ("channel", "float32")]
)
def test_quantised_checkpoints_are_evaluated_by_what_they_stand_for(
    scheme, dtype, tiny, calibration, rows, tmp_path
):
    widths = {"hidden_size": 160, "moe_intermediate_size": 136}
    stored, meant = quantise(tiny("glm4_moe", **widths), tmp_path, scheme)
    pruned = [
        prune_to(tmp_path / f"{name}-4", tmp_path / name, calibration, KEEP)
        for name in ("fp8", "meant")
    ]
    settings = eval_settings([stored, pruned[0]], calibration, compute_dtype=dtype)
    found = evaluate(settings).results
    oracles = [Reference(path, rows, getattr(torch, dtype)) for path in (meant, pruned[1])]
    for result, oracle in zip(found, oracles, strict=True):
        loss = expected_figures(rows, oracle.logits, oracle.logits).loss
        assert math.isclose(result.all.loss, loss, rel_tol=1e-5 if dtype == "float32" else 1e-3)


@pytest.mark.parametrize(
    "family_id",
    ["glm4_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_oss", "jamba"))],
)
def test_bfloat16_checkpoints_have_transformers_loss(family_id, tiny, calibration, tmp_path):
    source = tiny(family_id, dtype=torch.bfloat16)
    pruned = prune_to(tmp_path / "pruned", source, calibration, KEEP)
    # In bfloat16 a token now and then goes to another expert: of many that is seen no more.
    rows = list(np.random.default_rng(5).integers(3, VOCABULARY, (96, 32)))
    np.save(tmp_path / "rows.npy", np.array(rows))
    settings = eval_settings(
        [source, pruned], [str(tmp_path / "rows.npy")], compute_dtype="bfloat16", batch_tokens=512
    )
    for result, path in zip(evaluate(settings).results, (source, pruned), strict=True):
        logits = Reference(path, rows, torch.bfloat16).logits
        loss = expected_figures(rows, logits, logits).loss
        assert math.isclose(result.all.loss, loss, rel_tol=1e-3)


def test_criteria_and_targets_are_told_apart(written, calibration):
    source, scores, _ = written("deepseek_v3")
    candidates = (
        Candidate(scores, 4),
        Candidate(scores, sparsity="0.25"),
        Candidate(scores, 4, ChoiceSettings("ean")),
        *(Candidate(scores, 4, ChoiceSettings("random", seed)) for seed in (1, 2)),
        Candidate(scores, 8, label="all of them"),
    )
    found = evaluate(eval_settings([source], calibration, candidates=candidates)).results
    labels = ["reap keep 4", "reap keep 6", "ean keep 4"]
    labels += ["random seed 1 keep 4", "random seed 2 keep 4", "all of them"]
    assert [result.label for result in found] == [source.name, *labels]
    assert [result.keep for result in found] == [8, 4, 6, 4, 4, 4, 8]
    losses = [result.all.loss for result in found]
    assert len({round(loss, 6) for loss in losses[:-1]}) == len(found) - 1
    # Nothing is lost where nothing is pruned.
    assert found[-1].all == found[0].all
    assert set(found[-1].layers.values()) == {0.0}


def test_the_reference_is_its_own_reference(tiny, calibration):
    (found,) = evaluate(eval_settings([tiny("glm4_moe")], calibration)).results
    assert (found.all.kl, found.all.top1_agreement) == (0.0, 1.0)


def test_models_of_other_depth_are_compared_by_their_predictions(
    tiny, calibration, rows, reference
):
    source, deeper = tiny("mixtral"), tiny("mixtral", num_hidden_layers=4)
    wider = tiny("mixtral", hidden_size=48)
    found = evaluate(eval_settings([source, deeper, wider], calibration))
    logits = [reference(path).logits for path in (source, deeper, wider)]
    for result, own in zip(found.results, logits, strict=True):
        check_figures(result.all, expected_figures(rows, own, logits[0]))
    _, second, third = found.results
    assert list(second.layers) == list(range(len(reference(source).states)))
    assert third.layers == {}
    assert f"{deeper}: 4 layers, the reference has 3" in found.notes[0]
    assert f"{wider}: hidden states of [48] a token" in found.notes[1]
