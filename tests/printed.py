"""What a page shows of a command's output, against what the command prints.

Words and counts must be the same. Of figures, those that are the machine's own (seconds, resident
memory) are not compared, and those that are measured, with a decimal point or with separators of
thousands, may differ by a twentieth.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

ELLIPSIS = "…"
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_OF_THE_MACHINE = re.compile(r"\s*(?:s\b|GiB\b)")
_MEASURED_SHARE = 0.05
_MEASURED_LEAST = 0.02


def differences(shown: str, printed: str) -> list[str]:
    """Lines of `shown` that `printed` does not have where they should be.

    Args:
        shown: lines; one that is an ellipsis stands for any number of lines.
        printed: all lines.
    """
    wanted, found = _lines(shown), _lines(printed)
    place, anchored = 0, True
    missing = []
    for line in wanted:
        if line == ELLIPSIS:
            anchored = False
            continue
        where = next((at for at in range(place, len(found)) if alike(line, found[at])), None)
        if where is None or (anchored and where != place):
            missing.append(line)
        else:
            place = where + 1
        anchored = True
    if place < len(found) and anchored and not missing:
        missing.append(f"(nothing for: {found[place]})")
    return missing


def alike(shown: str, printed: str) -> bool:
    """Whether two lines say the same."""
    if _words(shown) != _words(printed):
        return False
    return all(
        _close(mine, theirs)
        for mine, theirs in zip(_figures(shown), _figures(printed), strict=True)
    )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _words(line: str) -> list[str]:
    return _NUMBER.sub("0", line).split()


def _figures(line: str) -> Iterator[str]:
    """Figures but those of the machine; places stay, as words are compared."""
    for found in _NUMBER.finditer(line):
        yield "" if _OF_THE_MACHINE.match(line, found.end()) else found[0]


def _close(shown: str, printed: str) -> bool:
    if not {",", "."} & {*shown, *printed}:
        return shown == printed
    mine, theirs = (float(text.replace(",", "")) for text in (shown, printed))
    return abs(mine - theirs) <= max(_MEASURED_LEAST, _MEASURED_SHARE * abs(mine))
