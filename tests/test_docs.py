from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from reap_stream.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_families_page_is_the_tests_list():
    generated = runpy.run_path(str(ROOT / "docs" / "generate_families.py"))["families_page"]()
    assert (ROOT / "docs" / "families.md").read_text() == generated, (
        "run: python docs/generate_families.py > docs/families.md"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    # In code, brackets and parentheses are a SPEC's.
    text = re.sub(r"`[^`\n]*`|^    .*$", "", page.read_text(), flags=re.MULTILINE)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    local = [target for target in targets if not target.startswith("https://")]
    assert [target for target in local if not (page.parent / target).exists()] == []


def examples():
    """Every example command line of the pages."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            yield from (line for line in block.splitlines() if line.startswith("reap-stream "))


@pytest.mark.parametrize("line", list(examples()))
def test_example_command_lines_are_accepted(line):
    arguments = build_parser().parse_args(line.split()[1:])
    assert callable(arguments.run)
