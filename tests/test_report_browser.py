"""The report in a real browser: not blank, in light and dark, and within a phone's width."""

from __future__ import annotations

import os
import shutil
import subprocess

import numpy as np
import pytest

from reap_stream.cli import main
from reap_stream.scoring.choosing import choose_experts
from reap_stream.settings import ChoiceSettings
from tests.reports import SOURCES, make_scores, write_evaluation, write_pruned

image = pytest.importorskip("matplotlib.image")

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
# Where a browser lies that is not on the path, e.g. one that Playwright fetched.
GIVEN = os.environ.get("REAP_STREAM_BROWSER")
BROWSER = GIVEN or next(filter(None, map(shutil.which, BROWSERS)), None)
LIGHT, DARK = (255, 255, 255), (13, 17, 23)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None, reason="no Chromium: apt-get install chromium-headless-shell"
    ),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    directory = tmp_path_factory.mktemp("browser")
    scores = make_scores(range(1, 13), 64)
    kept = choose_experts(scores.layers, SOURCES, 40, ChoiceSettings(), groups=1, num_layers=13)
    pruned = write_pruned(directory / "pruned", scores, kept)
    found = [("Big", "", 64, 2.0), ("half", "reap", 32, 2.5), ("quarter", "reap", 48, 2.1)]
    evaluation = write_evaluation(directory / "eval.json", found)
    arguments = ["report", pruned, "--eval", evaluation, "--output", directory / "page.html"]
    assert main([str(argument) for argument in arguments]) == 0
    return directory / "page.html"


def screenshot(page, size, *options):
    """Pixels as uint8 [height, width, 3]."""
    path = page.with_suffix(".png")
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--disable-dev-shm-usage", "--force-device-scale-factor=1", *options),
        f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={size[0]},{size[1]}",
        *(f"--screenshot={path}", page.as_uri()),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = image.imread(path)
    assert pixels.shape[:2] == (size[1], size[0])
    return np.round(255 * pixels[..., :3]).astype(np.uint8)


def filled(pixels, background):
    """Which rows and columns are more than background."""
    other = np.any(pixels != np.array(background, np.uint8), axis=-1)
    return other.any(axis=1), other.any(axis=0)


@pytest.mark.parametrize(
    ("size", "options", "background"),
    [
        ((1000, 5000), (), LIGHT),
        ((1000, 5000), ("--blink-settings=preferredColorScheme=0",), DARK),
        ((375, 6000), (), LIGHT),
        ((375, 6000), ("--blink-settings=preferredColorScheme=0",), DARK),
    ],
    ids=["light", "dark", "phone", "phone-dark"],
)
def test_a_page_is_seen(size, options, background, page):
    pixels = screenshot(page, size, *options)
    assert tuple(pixels[0, 0]) == background
    rows, columns = filled(pixels, background)
    # Nothing but the margins is empty, and nothing sticks out of them.
    assert rows[:3000].mean() > 0.5
    assert columns[20:-20].mean() > 0.95
    assert not columns[-12:].any()
    assert not columns[:12].any()
    # The heat maps: colours that are neither ink nor page, a good part of the first screens.
    colours = pixels[:2500].astype(int)
    vivid = np.ptp(colours, axis=-1) > 60
    assert vivid.mean() > 0.02
    assert len(np.unique(colours[vivid], axis=0)) > 50


def test_text_is_legible_in_both_themes(page):
    for options, background in (((), LIGHT), (("--blink-settings=preferredColorScheme=0",), DARK)):
        pixels = screenshot(page, (1000, 300), *options)[:120].astype(int)
        furthest = np.abs(pixels - np.array(background)).sum(axis=-1).max()
        assert furthest > 500
