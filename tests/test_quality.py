from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from quality import figures, loop_detector, page, tables
from quality.questions import calibration, sparsity, token_counts

TOKENS = st.integers(0, 5)


def test_the_page_is_what_the_figures_say():
    assert page.PAGE.read_text() == page.render(), "run: python benchmarks/quality/run.py render"


def test_every_figure_of_the_page_has_its_command():
    text = page.PAGE.read_text()
    commands = [f"benchmarks/quality/run.py {name} …" for name in page.QUESTIONS]
    assert [command for command in commands if text.count(command) != 1] == []


def test_figures_of_two_models_are_not_put_on_one_page():
    one = {"made_from": {"model": "a", "tokens": "t"}}
    other = {"made_from": {"model": "b", "tokens": "t"}}
    page.check_same_model({"x": one, "y": one})
    with pytest.raises(ValueError, match="2 different models"):
        page.check_same_model({"x": one, "y": other})


def test_figures_of_another_model_or_less_text_make_a_draft():
    made = {"model": "a", "tokens": "t", "sizes": page.SIZES}
    assert page.is_final({"x": {"made_from": made}}, "a")
    assert not page.is_final({"x": {"made_from": made}}, "b")
    assert not page.is_final({"x": {"made_from": made}}, None)
    less = {**made, "sizes": {**page.SIZES, "folds": 1}}
    assert not page.is_final({"x": {"made_from": made}, "y": {"made_from": less}}, "a")


def test_a_figure_that_there_is_not_is_no_blank():
    assert page.filled("a {{x.y}} b", {"x": {"y": "1"}}) == "a 1 b"
    with pytest.raises(KeyError, match="z"):
        page.filled("{{x.z}}", {"x": {"y": "1"}})


@pytest.mark.parametrize(
    ("tokens", "period"),
    [
        ([], 0),
        (list(range(64)), 0),
        ([7] * 15, 0),
        ([7] * 16, 1),
        ([1, 2] * 8, 2),
        ([1, 2] * 7, 0),
        ([9, 9, *[1, 2, 3] * 6], 3),
        ([*[1, 2, 3] * 6, 9], 0),
        ([*range(30), *[1, 2, 3, 4, 5] * 4, 1, 2], 5),
        (list(range(16)) * 4, 16),
        (list(range(16)) * 3, 0),
        (list(range(17)) * 8, 0),
    ],
)
def test_loops(tokens, period):
    assert loop_detector.loop_period(tokens) == period


@given(st.lists(TOKENS, max_size=40), st.lists(TOKENS, min_size=1, max_size=16))
def test_a_gram_repeated_long_enough_is_a_loop(before, gram):
    times = max(4, math.ceil(16 / len(gram)))
    period = loop_detector.loop_period([*before, *gram * times])
    # A shorter gram may repeat inside.
    assert 1 <= period <= len(gram)


@given(st.lists(TOKENS, max_size=80))
def test_loops_as_the_definition_has_them(tokens):
    def repeats(n):
        end = tokens[-max(4 * n, 16) :]
        whole = end[-n:] * (len(end) // n + 1)
        return len(end) == max(4 * n, 16) and end == whole[-len(end) :]

    expected = next((n for n in range(1, 17) if repeats(n)), 0)
    assert loop_detector.loop_period(tokens) == expected


def test_continuations_stop_where_they_end():
    assert loop_detector.until_end([3, 4, 0, 5, 0], 0) == ([3, 4], True)
    assert loop_detector.until_end([3, 4], 0) == ([3, 4], False)


def test_share_of_distinct_grams():
    assert loop_detector.distinct_share([1] * 13) == 1 / 10
    assert loop_detector.distinct_share(range(20)) == 1
    assert loop_detector.distinct_share([1, 2]) == 1


@given(st.integers(1, 3000), st.floats(0, 1))
def test_wilson_ends_are_those_rates_that_lie_z_errors_away(count, share):
    hits = round(count * share)
    for end in figures.wilson(hits, count):
        squared_error = end * (1 - end) / count
        assert (hits / count - end) ** 2 == pytest.approx(
            figures.Z_95**2 * squared_error, abs=1e-14
        )


def test_wilson_of_published_cases():
    assert figures.wilson(0, 10) == pytest.approx((0, 0.27754), abs=1e-5)
    assert figures.wilson(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    with pytest.raises(ValueError, match="11 of 10"):
        figures.wilson(11, 10)


@pytest.mark.parametrize(
    ("split", "p"),
    [((0, 0), 1), ((3, 3), 1), ((0, 5), 2 / 32), ((5, 0), 2 / 32), ((1, 9), 22 / 1024)],
)
def test_sign_test(split, p):
    assert figures.sign_test(*split) == pytest.approx(p)


def test_overlap_counts_over_all_layers():
    one = {1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}
    assert figures.overlap(one, one) == 1
    assert figures.overlap(one, {1: (0, 1, 2, 4), 2: (4, 5, 6, 7)}) == 3 / 8
    with pytest.raises(ValueError, match="sizes"):
        figures.overlap(one, {1: (0, 1, 2, 3), 2: (0, 1, 2)})


def test_a_difference_is_paired_by_fold():
    # Folds that differ by far more than the candidates do.
    mean, error = figures.paired({"folds": [1.0, 5.0, 9.0]}, {"folds": [1.1, 5.2, 9.3]})
    assert (mean, error) == (pytest.approx(0.2), pytest.approx(0.1 / math.sqrt(3)))


def test_tables_and_numbers():
    assert tables.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert [tables.percent(share) for share in (0.125, 0.5, 0.0, 1.0)] == [
        "12.5 %", "50 %", "0 %", "100 %",
    ]  # fmt: skip
    assert tables.percent(10) == "1000 %"
    assert tables.listed(["a", "b", "c"]) == "a, b and c"


def entry(loss, folds=(0.0, 0.0)):
    folds = [loss + fold for fold in folds]
    domains = {d: {"loss": loss, "folds": folds} for d in ("python", "prose", "tools")}
    figures = {"loss": loss, "kl": loss, "top1_agreement": 0.5, "tokens": 9}
    return {**figures, "domains": domains, "folds": folds}


def test_where_reap_does_not_lead_the_page_says_so():
    losses = {"reap": 1.0, "ean": 1.1, "frequency": 1.2, "gate": 1.3}
    found = {
        f"{method} {s}": entry(loss) for method, loss in losses.items() for s in sparsity.SPARSITIES
    }
    found |= {
        f"random-{seed} {s}": entry(1.05 + seed) for seed in range(5) for s in sparsity.SPARSITIES
    }
    result = {"keeps": dict.fromkeys(sparsity.SPARSITIES, 1), "candidates": found}
    found["original"] = entry(0.5)
    texts = sparsity.fields(result)
    assert texts["loss_verdict"] == "5 of 5 sparsities"
    assert "15 are above zero" in texts["clear"]
    assert "reap at 5, ean at 0" in texts["random"]
    found["ean 0.4"] = entry(0.75)
    texts = sparsity.fields(result)
    assert texts["loss_verdict"] == "4 of 5 sparsities (ean was 0.2500 lower at 40 %)"
    assert "14 are above zero" in texts["clear"]
    assert "1 below zero" in texts["clear"]


def test_own_text_and_other_text_are_told_apart():
    names = [f"{text} {s}" for text in calibration.TEXTS for s in calibration.SPARSITIES]
    found = {name: entry(2.0) for name in [*names, "original"]}
    found["prose 0.5"]["domains"]["prose"] = {"loss": 1.5, "folds": [1.6, 1.4]}
    found["prose 0.5"]["domains"]["tools"] = {"loss": 2.75, "folds": [2.75, 2.75]}
    overlaps = {s: dict.fromkeys(("python", "prose", "tools"), 0.5) for s in ("0.25", "0.5")}
    result = {"calibration_tokens": 5, "overlaps": overlaps, "candidates": found}
    verdict = calibration.fields(result)["verdict_50"]
    assert "+0.000 ± 0.000, -0.500 ± 0.100 and +0.000 ± 0.000 (python, prose" in verdict
    assert "+0.000 to +0.750" in verdict


def test_enough_tokens_is_the_size_from_which_all_runs_are_near():
    sizes = [{"rows": rows} for rows in token_counts.ROWS]

    def enough(losses):
        found = {
            f"{rows}-{replicate}": {"loss": loss}
            for rows, loss in zip(token_counts.ROWS, losses, strict=True)
            for replicate in range(token_counts.REPLICATES)
        }
        found |= {"all": {"loss": 3.0}, "original": {"loss": 2.0}}
        result = {"candidates": found, "sizes": sizes, "routed_per_row": 512, "experts": 32}
        return token_counts._enough(result)

    assert "From 16,384 routed tokens a layer on, which is 512" in enough([3.5, 3.2, 3.09, 3, 3])
    assert "From 65,536 routed tokens" in enough([3.5, 3, 3.2, 3, 3])
    assert "No size" in enough([3.5, 3.2, 3.2, 3.2, 3.2])


@pytest.mark.parametrize("name", page.QUESTIONS)
def test_stored_figures_are_whole(name):
    result = json.loads((page.RESULTS / f"{name}.json").read_text())
    assert result["question"] == name
    assert {"model", "tokens"} <= result["made_from"].keys()
