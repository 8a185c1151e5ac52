"""What MODEL means: a path if there is one, else an id on the Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final

# An id has two parts of letters, digits, `-`, `_` and `.`; a revision is a branch, tag or commit.
_HUB_NAME: Final = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on the Hub.

    Attributes:
        repository: its id, ``org/name``.
        revision: branch, tag or commit; None: the main branch.
    """

    repository: str
    revision: str | None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse_hub_name(text: str) -> HubName | None:
    """The id that `text` is, or None: a path that exists wins, and most paths cannot be ids."""
    match = _HUB_NAME.fullmatch(text)
    if match is None or os.path.lexists(text):
        return None
    return HubName(match["id"], match["revision"])
