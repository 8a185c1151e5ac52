"""A stream without end must not be read without end, however little of it is of use."""

from __future__ import annotations

from itertools import chain, cycle, repeat

import numpy as np
import pytest

from reap_stream.calibration.hub import HubSet
from reap_stream.calibration.packing import fill
from reap_stream.calibration.sampling import Window, draw
from reap_stream.errors import CalibrationError
from tests.corpora import load

WINDOW = Window(per_row=4, least=10)
# Ten times what would be enough for no row at all.
GIVEN_UP = 100


def row(nbytes):
    return lambda: np.arange(nbytes, dtype=np.int64)


def drawn(candidates, limit):
    return draw(candidates, limit, 0, WINDOW)


def filled(candidates, limit):
    return fill(candidates, (limit, 5), 0, WINDOW)


BOTH = pytest.mark.parametrize("take", [drawn, filled])


@BOTH
@pytest.mark.parametrize("length", [0, 1])
def test_a_stream_of_nothing_is_given_up(take, length):
    found = take(repeat(row(length)), 3)
    assert (found.rows, found.seen, found.skipped, found.gave_up) == ([], GIVEN_UP, GIVEN_UP, True)


@BOTH
def test_a_few_rows_are_kept_when_it_is_given_up(take):
    found = take(chain(repeat(row(5), 4), repeat(row(0))), 9)
    assert (len(found.rows), found.gave_up) == (4, True)
    assert found.seen == 4 * 4 * 10


@BOTH
@pytest.mark.parametrize("one_in", [1, 3, 20, 39])
def test_rare_rows_are_waited_for(take, one_in):
    """Rows that are rare but do come are all found."""
    found = take(cycle([row(5), *repeat(row(0), one_in - 1)]), 30)
    assert (len(found.rows), found.gave_up) == (30, False)


@BOTH
def test_a_stream_that_ends_is_read_to_its_end(take):
    found = take(repeat(row(0), GIVEN_UP - 1), 3)
    assert (found.seen, found.gave_up) == (GIVEN_UP - 1, False)


@pytest.mark.parametrize("take", [draw, lambda c, n, seed: fill(c, (n, 5), seed)])
def test_files_are_read_whole(take):
    found = take(chain(repeat(row(0), 5 * GIVEN_UP), [row(5)]), 3, 0)
    assert (len(found.rows), found.gave_up) == (1, False)


class Stream:
    """What `datasets` streams: first these texts, then blank ones for ever.

    Attributes:
        read: how many were taken.
    """

    def __init__(self, *texts):
        self.texts = texts
        self.read = 0

    def shuffle(self, **_):
        for text in chain(self.texts, repeat(" ")):
            self.read += 1
            yield {"text": text}


@pytest.fixture
def stream(monkeypatch):
    """Makes every data set of the Hub give these texts."""

    def call(*texts):
        made = Stream(*texts)
        hub_set = HubSet("org/blank", "default", "train", "0" * 40, "datasets 4", made)
        monkeypatch.setattr("reap_stream.calibration.sources.open_hub_set", lambda _: hub_set)
        return made

    return call


@pytest.mark.parametrize("pack", [False, True])
def test_a_blank_data_set_is_refused(stream, pack):
    made = stream()
    match = (
        r"org/blank:4' holds no row of at least 2 tokens \(10000 shorter ones\); no more are read"
    )
    with pytest.raises(CalibrationError, match=match):
        load("org/blank:4", pack=pack)
    assert made.read == 10_000


@pytest.mark.parametrize("pack", [False, True])
def test_a_data_set_with_few_rows_is_noted(stream, pack):
    stream("first", "second")
    corpus = load("org/blank:40", pack=pack)
    assert len(corpus.rows) == 2
    assert corpus.origins[0].seen == 10_000
    assert "org/blank:40: so few rows are of use that it was read no further" in corpus.notes
