"""Prose in lines of one length: figures that are put into a page change the length of its lines."""

from __future__ import annotations

import re
import textwrap

WIDTH = 100
_FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
_ITEM = re.compile(r"^(?=\* )", re.MULTILINE)
_KEPT = ("|", "#", "<")


def wrapped(page: str) -> str:
    """A Markdown page with its paragraphs and list items in lines of at most `WIDTH` characters."""
    parts = _FENCED.split(page)
    return "".join(part if part.startswith("```") else _wrapped_text(part) for part in parts)


def _wrapped_text(text: str) -> str:
    blocks = re.split(r"(\n\n+)", text)
    return "".join(_wrapped_block(block) for block in blocks)


def _wrapped_block(block: str) -> str:
    body = block.strip("\n")
    if not body or body.startswith(_KEPT):
        return block
    lead, tail = block[: block.index(body)], block[block.index(body) + len(body) :]
    return lead + "\n".join(_filled(item) for item in _ITEM.split(body) if item) + tail


def _filled(item: str) -> str:
    return textwrap.fill(
        " ".join(item.split()),
        WIDTH,
        subsequent_indent="  " if item.startswith("* ") else "",
        break_long_words=False,
        break_on_hyphens=False,
    )
