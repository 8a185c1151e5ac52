"""The report's page for everyone: on any screen, with a keyboard, read aloud, in any contrast."""

from __future__ import annotations

import re
from importlib.resources import files

import numpy as np
import pytest

from reap_stream.cli import main
from reap_stream.reporting.curves import curve_limit
from reap_stream.reporting.figures import figures_of
from reap_stream.reporting.subject import read_scores
from reap_stream.scoring.choosing import choose_experts
from reap_stream.scoring.scores_file import save_scores
from reap_stream.settings import ChoiceSettings
from tests.html_pages import Page
from tests.reports import SOURCES, make_scores, write_evaluation, write_pruned

pytest.importorskip("matplotlib.image")

LAYERS, EXPERTS, KEEP = range(2, 5), 24, 12


def write(subject, output, *options):
    arguments = ["report", str(subject), "--output", str(output), *map(str, options)]
    assert main(arguments) == 0
    return Page(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    directory = tmp_path_factory.mktemp("page")
    scores = make_scores(LAYERS, EXPERTS)
    kept = choose_experts(scores.layers, SOURCES, KEEP, ChoiceSettings(), groups=1, num_layers=5)
    found = write_evaluation(
        directory / "eval.json", [("Big", "", EXPERTS, 2.0), ("a", "", KEEP, 2.5)]
    )
    pruned = write_pruned(directory / "pruned", scores, kept)
    return write(pruned, directory / "page.html", "--eval", found)


def values(page, tag, key):
    return [value for own, name, value in page.attributes if (own, name) == (tag, key)]


def test_pictures_say_what_they_show(page):
    labels, roles = values(page, "svg", "aria-label"), values(page, "svg", "role")
    assert len(labels) == len(roles) == page.tags.count("svg")
    assert all(len(label.split()) >= 4 for label in labels)
    assert set(roles) == {"img"}
    assert values(page, "html", "lang") == ["en"]


def test_tables_that_scroll_can_be_reached_with_the_keyboard(page):
    scrolling = values(page, "div", "class").count("scroll")
    assert scrolling == page.tags.count("table") > 4
    assert values(page, "div", "tabindex") == ["0"] * scrolling
    labels = values(page, "div", "aria-label")
    assert len(set(labels)) == scrolling
    heads = page.tags.count("th")
    assert len(values(page, "th", "scope")) == heads > 10


def luminance(colour):
    """Relative luminance, as WCAG 2 defines it."""
    parts = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_text_stands_out_from_the_page_in_both_themes():
    style = files("reap_stream.reporting").joinpath("page.css").read_text(encoding="utf-8")
    themes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", theme))
        for ink, ground in (
            *((ink, "page") for ink in ("ink", "muted", "accent", "warn")),
            *((ink, "panel") for ink in ("ink", "muted")),
        ):
            shades = sorted(luminance(colours[name]) for name in (ink, ground))
            assert (shades[1] + 0.05) / (shades[0] + 0.05) >= 4.5, (ink, ground)


@pytest.mark.parametrize("layers", [1, 5, 90])
def test_curves_are_seen_from_their_beginning(layers, tmp_path):
    """But for the few layers that would press all others flat."""
    scores = make_scores(range(layers), 32)
    save_scores(tmp_path / "scores.safetensors", scores)
    figures = figures_of(read_scores(tmp_path / "scores.safetensors", ChoiceSettings()))
    highest = figures.relative.max(axis=1)
    assert (highest <= curve_limit(figures)).mean() >= 0.9
    assert curve_limit(figures) <= highest.max()


def test_text_of_strangers_is_text(tmp_path):
    labels = ("<script>alert(1)</script>", "$\\frac{", "_hidden\x00\u202e" + "x" * 300)
    scores = make_scores(LAYERS, EXPERTS, labels)
    kept = {layer: range(KEEP) for layer in LAYERS}
    pruned = write_pruned(
        tmp_path / "out",
        scores,
        kept,
        settings={"model": '"><img src=x onerror=alert(1)>'},
        versions={"<b>": "</table>"},
        calibration={"notes": ["</style><script>", 5]},
    )
    found = write(pruned, tmp_path / "page.html")
    assert "script" not in found.tags
    assert "img" not in found.tags
    assert "b" not in found.tags
    rows = [row[0] for row in found.tables["source-table"][1:]]
    assert rows[:2] == list(labels[:2])
    assert "\x00" not in rows[2]
    assert "\u202e" not in rows[2]
    assert len(rows[2]) <= 40


def test_a_large_model_stays_small(tmp_path):
    scores = make_scores(range(92), 160)
    kept = choose_experts(scores.layers, SOURCES, 96, ChoiceSettings(), groups=1, num_layers=92)
    output = tmp_path / "page.html"
    found = write(write_pruned(tmp_path / "out", scores, kept), output)
    assert output.stat().st_size < 3_000_000
    assert found.images["scores"][0].shape == (92, 160, 3)
