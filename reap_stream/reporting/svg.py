"""A drawing of matplotlib as a part of an HTML page: no address in it, colours of the page's theme.

What matplotlib writes is a document of its own: with a document type, namespaces, facts about itself
that are addresses, and ids that two drawings on one page would share. Here it becomes an element.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from xml.etree import ElementTree as ET

THEME: Final[Mapping[str, str]] = {
    "#1b1f24": "ink",
    "#59636e": "muted",
    "#d0d7de": "grid",
    "#ffffff": "page",
    "#0969da": "accent",
    "#bc4c00": "warn",
}
"""Colours that drawings are made in, the light ones, and the variables they become."""

_REFERENCE: Final = re.compile(r"(?<=url\()#|^#")
_COLOUR: Final = re.compile("|".join(THEME))
# Kept as they are: nothing an element of the page would lose by going without.
_DROPPED: Final = frozenset({"metadata", "title"})


def inline_svg(document: bytes, name: str, label: str, css_class: str = "") -> str:
    """The element of a drawing.

    Args:
        document: an SVG file of matplotlib.
        name: begins every id, so that ids are of this drawing alone.
        label: what the drawing shows, for those who do not see it.
        css_class: of the element.
    """
    # The text is matplotlib's own, made a moment ago; labels in it were cleaned before.
    root = ET.fromstring(document)  # noqa: S314 - not a stranger's
    _strip(root, name)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", label)
    if css_class:
        root.set("class", css_class)
    return ET.tostring(root, encoding="unicode", short_empty_elements=True)


def _strip(element: ET.Element, name: str) -> None:
    element.tag = _local(element.tag)
    element.attrib = {_local(key): _value(key, text, name) for key, text in element.items()}
    for child in list(element):
        if _local(child.tag) in _DROPPED:
            element.remove(child)
        else:
            _strip(child, name)


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _value(key: str, text: str, name: str) -> str:
    if _local(key) == "id":
        return f"{name}-{text}"
    if text.startswith("data:"):
        return text.replace("\n", "")
    text = _REFERENCE.sub(f"#{name}-", text) if not _COLOUR.fullmatch(text) else text
    return _COLOUR.sub(lambda match: f"var(--{THEME[match[0]]})", text)
