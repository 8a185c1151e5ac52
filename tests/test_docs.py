from __future__ import annotations

import re
import runpy
import shlex
from functools import cache
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from reap_stream.cli import build_parser
from reap_stream.formats import known_formats

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md")])
BY_NAME = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def prose(page):
    """A page without its code, in which brackets and parentheses are a SPEC's."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`|^    .*$", "", text, flags=re.MULTILINE)


def links(page):
    """Targets of the links and pictures of a page that lead to this repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if not target.startswith("https://")]


@cache
def anchors(page):
    """What code-hosting pages call the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_families_page_is_the_tests_list():
    generated = runpy.run_path(str(DOCS / "generate_families.py"))["families_page"]()
    assert (DOCS / "families.md").read_text() == generated, (
        "run: python docs/generate_families.py > docs/families.md"
    )


def test_formats_page_has_a_matrix_of_every_format():
    page = (DOCS / "formats.md").read_text("utf-8")
    generated = runpy.run_path(str(DOCS / "generate_formats.py"))["formats_page"](page)
    assert page == generated, "run: python docs/generate_formats.py"
    shown = set(re.findall(r"^\|.*\| `([\w-]+)` \|$", page, re.MULTILINE))
    assert {fmt.name for fmt in known_formats({})} <= shown


@BY_NAME
def test_links_lead_somewhere(page):
    broken = []
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_every_page_is_in_the_index_and_the_index_in_the_readme():
    index = DOCS / "README.md"
    assert {page.name for page in PAGES if page.parent == DOCS} - {index.name} <= set(links(index))
    assert "docs/README.md" in links(ROOT / "README.md")


@pytest.mark.parametrize("picture", sorted(DOCS.glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_plain_and_have_a_dark_form(picture):
    text = picture.read_text("utf-8")
    tags = {element.tag.rpartition("}")[2] for element in ET.fromstring(text).iter()}
    assert "title" in tags
    assert not tags & {"script", "image", "foreignObject", "a"}
    assert "prefers-color-scheme: dark" in text
    assert any(picture.name in links(page) for page in PAGES)


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 210


def examples():
    """Every example command line of the pages, continued lines joined."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            yield from (line for line in lines if line.startswith("reap-stream "))


@pytest.mark.parametrize("line", list(examples()))
def test_example_command_lines_are_accepted(line):
    arguments = build_parser().parse_args(shlex.split(line)[1:])
    assert callable(arguments.run)
