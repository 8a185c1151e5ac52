"""Cards of pruned checkpoints, and a source that has one of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from reap_stream.cli import main
from tests.engine import prune_to

KEEP = 4
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE_CARD = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language:
- en
- zh
pipeline_tag: text-generation
base_model: org/older
gated: true
tags: [conversational]
---
# Tiny

Of *its* own.
"""


def cached_source(model: Path, root: Path) -> Path:
    """A copy of a model as a snapshot of the Hub's cache, with a card."""
    folder = root / "models--org--Tiny-8B" / "snapshots" / COMMIT
    shutil.copytree(model, folder)
    (folder / "README.md").write_text(SOURCE_CARD, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """A model as a snapshot of the Hub's cache."""
    return cached_source(tiny("glm4_moe"), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def pruned(source, calibration, tmp_path_factory):
    """A pruned checkpoint of it."""
    return prune_to(tmp_path_factory.mktemp("card") / "pruned", source, calibration, KEEP)


@pytest.fixture
def directory(pruned, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(pruned, tmp_path / "checkpoint")


@pytest.fixture
def render(directory, capsys):
    """Runs `card`; status and standard error."""

    def run(*more):
        status = main(["card", str(directory), *map(str, more)])
        return status, capsys.readouterr().err

    return run


def card(directory):
    return ModelCard.load(directory / "README.md")


def rows(text):
    """First cell → the others, of every table."""
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]
