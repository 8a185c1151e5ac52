"""HTML pages read back: what a browser would find in them."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np

# Elements that have no end.
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """What stands in a page: tables and sections by id, and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables, self.text, self.tags, self.attributes = {}, {}, [], []
        self.images: dict[str, list[np.ndarray]] = {}
        self._open: list[tuple[str, str]] = []
        self._table = None
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append((tag, dict(attrs).get("id", "")))

    def handle_startendtag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag == "table":
            self._table = self.tables.setdefault(found["id"], [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
        elif tag == "image":
            from matplotlib.image import imread

            raw = base64.b64decode(found["href"].partition(",")[2])
            pixels = imread(io.BytesIO(raw))
            self.images.setdefault(self.section, []).append(np.round(255 * pixels[..., :3]))

    @property
    def section(self):
        return next((name for tag, name in reversed(self._open) if tag == "section"), "")

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        self.text[self.section] = self.text.get(self.section, "") + data
        if self._open and self._open[-1][0] in ("td", "th"):
            self._table[-1][-1] += data
