"""The comparison that holds pages against commands finds what differs, and only that."""

from __future__ import annotations

import pytest

from tests.printed import alike, differences

PRINTED = "a 24 experts\nloss 3.6924\n12.0 s · peak memory 0.58 GiB\nend\n"


@pytest.mark.parametrize(
    "shown",
    [
        PRINTED,
        "a  24 experts\n\nloss 3.70\n9.1 s · peak memory 2.50 GiB\nend\n",
        "a 24 experts\n…\nend\n",
        "…\nloss 3.6924\n…\n",
        "…\n",
    ],
)
def test_what_is_shown_of_an_output_may_be_less(shown):
    assert differences(shown, PRINTED) == []


@pytest.mark.parametrize(
    ("shown", "missing"),
    [
        ("a 23 experts\n…\n", ["a 23 experts"]),
        ("a 24 models\n…\n", ["a 24 models"]),
        ("…\nloss 4.6924\n…\n", ["loss 4.6924"]),
        ("loss 3.6924\n…\n", ["loss 3.6924"]),
        ("…\nend\na 24 experts\n", ["a 24 experts"]),
        ("a 24 experts\nend\n", ["end"]),
        ("a 24 experts\nloss 3.6924\n", ["(nothing for: 12.0 s · peak memory 0.58 GiB)"]),
    ],
)
def test_what_is_shown_otherwise_is_found(shown, missing):
    assert differences(shown, PRINTED) == missing


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("9,164,628 bytes", "9,164,630 bytes", True),
        ("9,164,628 bytes", "8,164,628 bytes", False),
        ("841 tensors", "842 tensors", False),
        ("KL 0.0048", "KL 0.0051", True),
        ("86.3 %", "80.0 %", False),
        ("memory 0.58 GiB", "memory 4.00 GiB", True),
        ("wrote 0.58 GB", "wrote 4.00 GB", False),
        ("3 s", "5 s", True),
        ("3 shards", "5 shards", False),
    ],
)
def test_counts_are_exact_and_measurements_near(shown, printed, same):
    assert alike(shown, printed) == same
