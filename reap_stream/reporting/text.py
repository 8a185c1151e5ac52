"""Text of strangers, such as labels of sources, made fit to be shown."""

from __future__ import annotations

import html
import unicodedata
from typing import Final

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
# Control and format characters, surrogates, private use, and what is not assigned.
_UNSHOWN: Final = ("Cc", "Cf", "Cs", "Co", "Cn")


def clean(text: str) -> str:
    """The text without characters that no page or drawing can hold or that steer its direction."""
    return "".join(
        _REPLACEMENT if unicodedata.category(letter) in _UNSHOWN else letter for letter in text
    )


def short_label(text: str, length: int = 40) -> str:
    """The text, its middle left out where it is longer: paths differ at their ends."""
    text = clean(text)
    if len(text) <= length:
        return text
    head = (length - 1) // 3
    return f"{text[:head]}…{text[-(length - 1 - head) :]}"


def escaped(text: object) -> str:
    """Any value as text of a page."""
    return html.escape(clean(str(text)))


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f} %"


def counted(number: int, singular: str, plural: str = "") -> str:
    """A number and its noun."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
