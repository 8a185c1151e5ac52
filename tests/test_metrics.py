"""Loss, divergence and agreement against naive formulas in float64."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reap_stream.errors import ForwardError
from reap_stream.evaluation import metrics
from reap_stream.evaluation.metrics import Comparison, HiddenError, log_softmax_

SOURCES = 3


def zeros(count):
    """Sources or targets that are all the same."""
    return torch.zeros(count, dtype=torch.int64)


def softmax(logits):
    """Float64 probabilities, one token after the other."""
    rows = []
    for row in logits.double().numpy():
        powers = np.array([math.exp(x - row.max()) for x in row])
        rows.append(powers / powers.sum())
    return rows


def naive(logits, reference, targets):
    """(loss, kl, agreement) of each token, by the definitions."""
    found = []
    for p, q, target in zip(softmax(reference), softmax(logits), targets.tolist(), strict=True):
        loss = -math.log(q[target]) if q[target] else math.inf
        kl = sum(
            p_i * (math.log(p_i / q_i) if q_i else math.inf)
            for p_i, q_i in zip(p, q, strict=True)
            if p_i
        )
        found.append((loss, kl, float(p.argmax() == q.argmax())))
    return found


def compare(logits, reference, targets, sources, *, pieces=1):
    """All tokens, added in some pieces."""
    made = Comparison(SOURCES)
    own = None if reference is None else log_softmax_(reference.clone())
    for rows in torch.arange(len(logits)).chunk(pieces):
        made.add(
            logits[rows], None if own is None else own[rows], targets[rows], sources[rows].int()
        )
    return made


@st.composite
def slices(draw):
    """Logits of a candidate and a reference, targets and sources; some tokens cannot come."""
    tokens, vocabulary = draw(st.integers(1, 12)), draw(st.integers(2, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.01, 1.0, 8.0]))
    apart = draw(st.sampled_from([0.0, 1e-5, 1e-2, 1.0]))
    reference = torch.randn(tokens, vocabulary, generator=generator) * scale
    logits = reference + torch.randn(tokens, vocabulary, generator=generator) * apart
    masked = draw(st.integers(0, vocabulary - 1))
    for given_logits in (reference, logits):
        given_logits[:, vocabulary - masked :] = -math.inf
    targets = torch.randint(vocabulary - masked, (tokens,), generator=generator)
    sources = torch.randint(SOURCES, (tokens,), generator=generator)
    return logits, reference, targets, sources


@given(slices(), st.integers(1, 5))
def test_figures_are_the_naive_means(drawn, pieces):
    logits, reference, targets, sources = drawn
    made = compare(*drawn, pieces=pieces)
    expected = np.array(naive(logits, reference, targets))
    for source in (*range(SOURCES), None):
        mine = np.ones(len(targets), bool) if source is None else (sources == source).numpy()
        figures = made.figures(source)
        assert figures.tokens == mine.sum()
        if not figures.tokens:
            assert all(math.isnan(v) for v in (figures.loss, figures.kl, figures.top1_agreement))
            continue
        loss, kl, agreement = expected[mine].mean(axis=0)
        assert figures.loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
        assert figures.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        assert figures.kl == pytest.approx(kl, rel=1e-5, abs=1e-6)
        assert figures.kl >= 0
        assert figures.top1_agreement == pytest.approx(agreement)


@pytest.mark.parametrize("apart", [1e-4, 1e-3, 1e-2, 0.1])
def test_small_divergences_keep_their_digits(apart):
    """Summed by the definition in float32 the smallest come out wrong, or negative."""
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(64, 2000, generator=generator) * 4 + 20
    logits = reference + torch.randn(64, 2000, generator=generator) * apart
    nothing = zeros(64)
    kl = np.mean([token[1] for token in naive(logits, reference, nothing)])
    found = compare(logits, reference, nothing, nothing).figures().kl
    assert found == pytest.approx(kl, rel=1e-2, abs=2e-9)
    by_definition = reference.softmax(-1) * (reference.log_softmax(-1) - logits.log_softmax(-1))
    if apart <= 1e-4:
        naive_error = abs(float(by_definition.sum(-1).mean()) - kl)
        assert naive_error > 10 * abs(found - kl)


def test_a_model_compared_with_itself_is_the_same():
    logits = torch.randn(50, 3000) * 10
    targets, sources = torch.randint(3000, (50,)), torch.randint(SOURCES, (50,))
    same, itself = (
        compare(logits, logits, targets, sources),
        compare(logits, None, targets, sources),
    )
    for source in (*range(SOURCES), None):
        assert same.figures(source) == itself.figures(source)
    assert (same.figures().kl, same.figures().top1_agreement) == (0.0, 1.0)


def test_inputs_stay_and_pieces_do_not_matter(monkeypatch):
    logits, reference = torch.randn(2, 30, 50)
    targets, sources = torch.randint(50, (30,)), torch.randint(SOURCES, (30,))
    before = logits.clone()
    whole = compare(logits, reference, targets, sources)
    assert torch.equal(logits, before)
    monkeypatch.setattr(metrics, "_PIECE_ELEMENTS", {"cpu": 120})
    small = compare(logits, reference, targets, sources)
    for source in (*range(SOURCES), None):
        mine, theirs = (made.figures(source).document() for made in (small, whole))
        assert mine == pytest.approx(theirs, rel=1e-12)


def test_the_most_likely_of_equals_is_the_first():
    logits = torch.tensor([[1.0, 2.0, 2.0], [2.0, 2.0, 1.0]])
    reference = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    targets = zeros(2)
    assert compare(logits, reference, targets, targets).figures().top1_agreement == 0.5


def test_impossible_tokens():
    inf = math.inf
    logits = torch.tensor([[0.0, -inf, 1.0], [0.0, -inf, 1.0], [0.0, 1.0, 1.0]])
    reference = torch.tensor([[0.0, -inf, 1.0], [0.0, 1.0, 1.0], [0.0, -inf, 1.0]])
    targets, sources = torch.tensor([0, 1, 0]), torch.arange(3)
    made = compare(logits, reference, targets, sources)
    # Impossible for both: nothing. For the candidate alone: infinitely far. For the reference alone:
    # what the candidate wastes on it.
    assert made.figures(0).kl == 0.0
    assert (made.figures(1).kl, made.figures(1).loss) == (inf, inf)
    assert made.figures(2).kl == pytest.approx(naive(logits, reference, targets)[2][1], rel=1e-6)
    assert made.figures().kl == made.figures().loss == made.figures().perplexity == inf
    document = made.figures(1).document()
    assert json.loads(json.dumps(document, allow_nan=False)) == {
        "tokens": 1, "loss": None, "perplexity": None, "kl": None, "top1_agreement": 0.0,
    }  # fmt: skip


def test_improbable_tokens_do_not_overflow():
    logits = torch.tensor([[0.0, -3000.0], [0.0, 120.0]])
    reference = torch.tensor([[0.0, -90.0], [100.0, 0.0]])
    targets = torch.tensor([1, 0])
    made = compare(logits, reference, targets, zeros(2))
    assert made.figures().loss == pytest.approx((3000 + 120) / 2)
    assert made.figures().perplexity == math.inf
    assert made.figures().kl == pytest.approx(120 / 2, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("where", ["candidate", "reference"])
def test_logits_that_are_no_numbers_are_an_error(value, where, monkeypatch):
    monkeypatch.setattr(metrics, "_PIECE_ELEMENTS", {"cpu": 20})
    logits = torch.randn(9, 10)
    if value is None:
        logits[7] = -math.inf
    else:
        logits[7, 3] = value
    nothing = zeros(9)
    add = Comparison(1).add if where == "candidate" else lambda given, *_: log_softmax_(given)
    with pytest.raises(ForwardError, match="logits of token 7 of the slice are not finite"):
        add(logits, None, nothing, nothing)


@pytest.mark.parametrize("target", [10, -1])
def test_targets_without_a_logit_are_an_error(target):
    targets = torch.tensor([0, target])
    with pytest.raises(ForwardError, match=f"token {target} is to be predicted, .* has 10 logits"):
        Comparison(1).add(torch.randn(2, 10), None, targets, zeros(2))


def test_nothing_to_add():
    made, error = Comparison(1), HiddenError(1)
    made.add(torch.empty(0, 5), None, torch.empty(0, dtype=torch.int64), torch.empty(0))
    error.add(torch.empty(0, 5), torch.empty(0, 5), torch.empty(0))
    assert made.figures().document() == {
        "tokens": 0, "loss": None, "perplexity": None, "kl": None, "top1_agreement": None,
    }  # fmt: skip
    assert math.isnan(error.relative_error())


@given(st.integers(1, 20), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_hidden_error_is_the_naive_one(tokens, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    candidate, reference = torch.randn(2, tokens, 2, 6, generator=generator).to(dtype)
    sources = torch.randint(SOURCES, (tokens,), generator=generator)
    made = HiddenError(SOURCES)
    for rows in torch.arange(tokens).chunk(3):
        made.add(candidate[rows], reference[rows], sources[rows].int())
    for source in (*range(SOURCES), None):
        mine = torch.ones(tokens, dtype=torch.bool) if source is None else sources == source
        one, other = candidate[mine].double().numpy(), reference[mine].double().numpy()
        found = made.relative_error(source)
        if not len(one):
            assert math.isnan(found)
            continue
        expected = math.sqrt(((one - other) ** 2).sum()) / math.sqrt((other**2).sum())
        assert found == pytest.approx(expected, rel=1e-12)


def test_large_hidden_states_do_not_overflow():
    made = HiddenError(1)
    made.add(torch.full((2, 3), 2e30), torch.full((2, 3), 1e30), zeros(2))
    assert made.relative_error() == pytest.approx(1.0)


def test_hidden_states_of_zeros():
    made = HiddenError(2)
    nothing = torch.zeros(1, 4)
    made.add(nothing + 1, nothing, zeros(1))
    assert made.relative_error(0) == math.inf
    made.add(nothing, nothing, zeros(1) + 1)
    assert math.isnan(made.relative_error(1))


def test_hidden_states_that_are_no_numbers_are_an_error():
    reference = torch.zeros(4, 3)
    candidate = reference.clone()
    candidate[2, 1] = math.nan
    with pytest.raises(ForwardError, match="hidden states of token 2 of the slice"):
        HiddenError(1).add(candidate, reference, zeros(4))
