"""Code and prose of the built-in calibration text, one excerpt a document.

Excerpts are about as long as a row of 2,048 tokens, so that few of them are cut.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from demo_model.texts import documents, is_held_out

EXCERPT_CHARACTERS = 8_000
_SHORTEST_CHARACTERS = 3_000
# Later addresses are more of a speech and less of English prose; accounts are neither.
_LAST_YEAR = 1930
_MOST_DIGITS = 0.02
# Tables, jokes, demonstrations and what Python has since removed.
_NOT_CODE = re.compile(r"_sysconfigdata|_compat_pickle|pydoc_data|this\.py|distutils|turtledemo")
_NOTICE = re.compile(r"copyright|licen[sc]e", re.IGNORECASE)


def python_sources() -> Iterator[tuple[str, str]]:
    """(path, source) of the standard library's modules that the demo does not hold out.

    Modules with a notice of their own are passed over: all that is taken stands under Python's
    licence and nothing else.
    """
    for name, text in documents("python", Path()):
        if not (is_held_out(name) or _NOT_CODE.search(name) or _NOTICE.search(str(text))):
            yield name, str(text)


def code(rng: random.Random) -> Iterator[dict[str, str]]:
    """One excerpt of each module, in random order: whole top-level statements."""
    for name, source in _shuffled(python_sources(), rng):
        pieces = [p for p in cut_source(source, EXCERPT_CHARACTERS) if _fits(p)]
        if pieces:
            yield {"text": rng.choice(pieces), "source": f"Python, Lib/{name}"}


def prose(rng: random.Random, directory: Path) -> Iterator[dict[str, str]]:
    """One excerpt of each chapter and address by turns, in random order: whole sentences."""
    found = [(n, str(t)) for n, t in documents("prose", directory) if not is_held_out(n)]
    chapters = [(n, t) for n, t in found if n.startswith("chapter")]
    addresses = [(n, t) for n, t in found if n[:4].isdigit() and int(n[:4]) < _LAST_YEAR]
    turns = zip(_shuffled(chapters, rng), _shuffled(addresses, rng), strict=False)
    for name, text in chain.from_iterable(turns):
        pieces = [p for p in cut_sentences(text, EXCERPT_CHARACTERS) if _fits(p)]
        pieces = [p for p in pieces if sum(map(str.isdigit, p)) < _MOST_DIGITS * len(p)]
        title = name.removesuffix(".json").replace("_", " ")
        kind = "Moby Dick" if title.startswith("chapter") else "State of the Union address"
        if pieces:
            yield {"text": rng.choice(pieces), "source": f"{kind}, {title}"}


def cut_source(source: str, most: int) -> Iterator[str]:
    """Cuts Python source before top-level statements; the pieces joined are the source.

    A single statement longer than `most` characters stays whole.
    """
    lines = source.splitlines(keepends=True)
    starts = [_first_line(node, lines) for node in ast.parse(source).body[1:]]
    bounds = zip([0, *starts], [*starts, len(lines)], strict=True)
    return _joined(["".join(lines[start:stop]) for start, stop in bounds], most)


def _first_line(node: ast.stmt, lines: list[str]) -> int:
    """Where a statement begins: its decorators and the comment above it belong to it."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    line = min(place.lineno for place in (node, *decorators)) - 1
    while line and lines[line - 1].startswith("#"):
        line -= 1
    return line


def cut_sentences(text: str, most: int) -> Iterator[str]:
    """Cuts prose behind sentences; the pieces joined are the text."""
    return _joined(re.split(r"(?<=[.?!] )(?=[A-Z\"])", text), most)


def _joined(parts: list[str], most: int) -> Iterator[str]:
    piece = ""
    for part in parts:
        if piece and len(piece) + len(part) > most:
            yield piece
            piece = ""
        piece += part
    if piece:
        yield piece


def _fits(piece: str) -> bool:
    return _SHORTEST_CHARACTERS <= len(piece) <= EXCERPT_CHARACTERS


def _shuffled(found: Iterable[tuple[str, str]], rng: random.Random) -> list[tuple[str, str]]:
    everything = list(found)
    rng.shuffle(everything)
    return everything
