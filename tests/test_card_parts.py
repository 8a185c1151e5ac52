"""What a card is put together from: names, a stranger's card, data sets, paths left out."""

from __future__ import annotations

import pytest

from reap_stream.card.base import short_count, suggested_name
from reap_stream.card.markdown import code, table
from reap_stream.card.metadata import data_sets
from reap_stream.card.source import SourceCard, read_source_card


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("plain", "`plain`"),
        ("a|b", "`a\\|b`"),
        ("a`b", "``a`b``"),
        ("`", "`` ` ``"),
        ("two\nlines", "`two lines`"),
    ],
)
def test_strangers_text_is_no_markup(text, span):
    assert code(text) == span


def test_tables_have_a_rule_below_their_header():
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("GLM-4.6", "reap", (217, 32), "keep", None), "GLM-4.6-REAP-217B-A32B"),
        (("GLM-4.6-FP8", "reap", (217, 32), "keep", "FP8"), "GLM-4.6-REAP-217B-A32B-FP8"),
        (("GLM-4.6", "reap", (217, 32), "fp8", "FP8"), "GLM-4.6-REAP-217B-A32B-FP8"),
        (("GLM-4.6-FP8", "reap", (217, 32), "bf16", None), "GLM-4.6-REAP-217B-A32B"),
        (("M-BF16", "ean", (10, 1), "fp8-channel", "FP8"), "M-EAN-10B-A1.0B-FP8"),
        (("M-NVFP4", "reap", (10, 3), "keep", "NVFP4"), "M-REAP-10B-A3B-NVFP4"),
        (("M", "random", (10, 3), "keep", "AWQ"), "M-RANDOM-10B-A3B"),
    ],
)
def test_names_are_those_of_the_hub(arguments, name):
    base, method, billions, weights, quantization = arguments
    parameters = tuple(count * 10**9 for count in billions)
    assert suggested_name(base, method, parameters, weights, quantization) == name


def test_counts_are_rounded_as_names_round_them():
    counts = (999, 1500, 350_000_000, 1_540_000_000, 3_300_000_000, 216_800_000_000)
    assert [*map(short_count, counts)] == ["999", "1.5K", "350M", "1.5B", "3B", "217B"]


@pytest.mark.parametrize(
    ("raw", "card"),
    [
        (None, SourceCard()),
        (b"# Plain\n", SourceCard({}, "# Plain")),
        (b"---\r\nlicense: mit\r\n---\r\n# It\r\n", SourceCard({"license": "mit"}, "# It")),
        (b"\xef\xbb\xbf---\nlicense: mit\n---\nIt", SourceCard({"license": "mit"}, "It")),
        (b"---\nlicense: [\n---\nIt", SourceCard({}, "It")),
        (b"---\n- a\n---\nIt", SourceCard({}, "It")),
        (b"---\n---\nIt", SourceCard({}, "It")),
        (b"---\nnever closed\n", SourceCard({}, "---\nnever closed")),
        (b"caf\xe9", SourceCard({}, "caf\ufffd")),
        (b"text\n\n---\nlicense: mit\n---\n", SourceCard({}, "text\n\n---\nlicense: mit\n---")),
    ],
)
def test_cards_of_strangers(raw, card):
    assert read_source_card(raw) == card


def test_only_what_the_hub_knows_is_inherited():
    metadata = {"license": ["mit", "apache-2.0"], "license_link": {"a": 1}, "language": "en"}
    assert SourceCard({**metadata, "pipeline_tag": 3}).inherited() == {
        "license": ["mit", "apache-2.0"],
        "language": "en",
    }


@pytest.mark.parametrize(
    ("calibration", "found"),
    [
        ({"sources": ["a/b[c](d):9", "x.jsonl:3", "builtin", "a/b(e):1"]}, ["a/b"]),
        ({"sources": ["not a spec"]}, []),
        (
            {
                "sources": ["m", "n"],
                "origins": [{"kind": "hub", "name": "a/b"}, {"kind": "file", "name": "c/d"}],
            },
            ["a/b"],
        ),
    ],
)
def test_data_sets_are_those_of_the_hub(calibration, found):
    assert data_sets({"calibration": calibration}) == found
