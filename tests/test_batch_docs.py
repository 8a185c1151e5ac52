"""docs/batch.md says what the code does: its keys, its example, its summary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reap_stream.batch.evaluations import Evaluations
from reap_stream.batch.jobs_file import read_jobs
from reap_stream.batch.keys import EVALUATING, KEYS
from reap_stream.batch.outcomes import Board
from reap_stream.batch.records import Records
from reap_stream.batch.summary import Summary

PAGE = (Path(__file__).parents[1] / "docs" / "batch.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


def keys_of(text):
    """Names in the first column of a text's tables."""
    cells = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]*)`", cell)]


def section(title):
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_key_is_explained_once():
    keys, _, table = section("Keys").partition("`eval` as a table")
    assert sorted(keys_of(keys)) == sorted(KEYS)
    assert sorted({*keys_of(table), "text"}) == sorted(EVALUATING)


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_are_jobs(text, tmp_path):
    path = tmp_path / "jobs.toml"
    path.write_text(text, encoding="utf-8")
    jobs = read_jobs(path)
    printed = re.findall(r"^(\S+) +tiny ", PAGE, re.MULTILINE)
    assert [job.name for job in jobs] in (printed, ["out-GLM-4.6-FP8"])


def test_every_key_of_the_summary_is_explained(tmp_path):
    path = tmp_path / "jobs.toml"
    path.write_text(EXAMPLES[0], encoding="utf-8")
    jobs = read_jobs(path)
    summary = Summary(Board(jobs), Records(tmp_path), Evaluations(tmp_path))
    document = summary.document()
    assert set(keys_of(section("summary.json"))) == set(document["jobs"][0])
    head = re.split(r"\s{2,}", summary.table().splitlines()[0].strip())
    shown = re.search(r"^job  .*$", PAGE, re.MULTILINE)[0]
    assert re.split(r"\s{2,}", shown.strip()) == head
    assert document["total"]["jobs"] == len(jobs)
