"""docs/troubleshooting.md, and other pages that quote messages, quote what the program prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reap_stream import errors
from tests.source_messages import ELLIPSIS, is_printed, source_messages

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")


def first_cells(text):
    """What the rows of tables quote in their first cell."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


QUOTED = first_cells(PAGE)
ELSEWHERE = [
    (name, quoted)
    for name in ("serving.md", "ranks.md")
    for quoted in first_cells((DOCS / name).read_text(encoding="utf-8"))
    if ELLIPSIS in quoted
]


def test_many_messages_are_explained():
    assert len(QUOTED) > 60
    assert len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_messages_are_in_the_source(quoted):
    assert max(len(part.strip()) for part in quoted.split(ELLIPSIS)) >= 12, "says too little"
    assert is_printed(quoted), f"no text of the package is like {quoted!r}"


@pytest.mark.parametrize(("page", "quoted"), ELSEWHERE)
def test_messages_that_other_pages_quote_are_in_the_source(page, quoted):
    assert is_printed(quoted), f"{page}: no text of the package is like {quoted!r}"


def test_what_nobody_prints_is_not_found():
    assert len(source_messages()) > 500
    assert not is_printed("the … is out of cheese")
    assert not is_printed("raise --memory …: the memory budget is")


def test_every_exit_code_is_explained():
    told = {int(code) for code in re.findall(r"^\| (\d+)\b", PAGE, re.MULTILINE)}
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {kind.exit_code for kind in classes if issubclass(kind, errors.ReapStreamError)}
    assert codes | {0} <= told
