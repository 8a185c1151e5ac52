"""Excerpts of held-out documents, small enough to ship beside the model.

One JSON Lines file a domain, a record an excerpt: ``{"name", "text"}``, or ``{"name", "messages",
"tools"}`` of a conversation. No excerpt is longer than a row of the evaluation.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from demo_model.texts import documents, is_held_out
from demo_model.tokens import DOMAINS

PYTHON_LICENCE = "LICENSE.python.txt"
_FILE_NBYTES = 75_000
# Some 450 tokens.
_EXCERPT_CHARACTERS = 1_500
_SHORTEST_CHARACTERS = 500
# Modules under a notice of others than the Python Software Foundation.
_OTHERS = frozenset({"codecs.py", "uu.py"})


def write_held_out(prose: Path, directory: Path) -> None:
    """Writes ``python.jsonl``, ``prose.jsonl`` and ``tools.jsonl``.

    Args:
        prose: directory of the prose's archives.
        directory: of the files; is made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        lines, nbytes = [], 0
        for record in records(domain, prose):
            line = json.dumps(record, ensure_ascii=False) + "\n"
            nbytes += len(line.encode())
            if nbytes > _FILE_NBYTES:
                break
            lines.append(line)
        (directory / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8")
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    shutil.copyfile(licence, directory / PYTHON_LICENCE)


def records(domain: str, prose: Path) -> Iterator[dict[str, Any]]:
    """Excerpts of a domain: the first of each document, then the second of each, and so on."""
    held_out = [(n, c) for n, c in documents(domain, prose) if is_held_out(n) and n not in _OTHERS]
    streams = [_excerpts(name, content) for name, content in held_out]
    turns = chain.from_iterable(zip_longest(*streams))
    return (record for record in turns if record is not None)


def _excerpts(name: str, content: str | dict[str, Any]) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        yield {"name": name, **content}
        return
    for text in _cut(content):
        if len(text) >= _SHORTEST_CHARACTERS:
            yield {"name": name, "text": text}


def _cut(text: str) -> Iterator[str]:
    """Cuts a text at ends of lines, or of words where lines are long."""
    while len(text) > _EXCERPT_CHARACTERS:
        head = text[:_EXCERPT_CHARACTERS]
        end = head.rfind("\n") + 1
        if end < _SHORTEST_CHARACTERS:
            end = head.rfind(" ") + 1 or len(head)
        yield text[:end]
        text = text[end:]
    yield text
