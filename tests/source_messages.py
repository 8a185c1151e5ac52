"""Every text in the package's source, with an ellipsis for what is filled in when it is printed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import reap_stream

ELLIPSIS = "…"


@cache
def source_messages() -> tuple[str, ...]:
    """The texts; of those that are put together, the whole."""
    package = Path(reap_stream.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        found += _messages(ast.parse(path.read_text(encoding="utf-8")))
    return tuple(found)


def is_printed(quoted: str) -> bool:
    """Whether a text of the source is what is quoted, whatever stands for the ellipses."""
    parts = [re.escape(part.strip()) for part in quoted.split(ELLIPSIS)]
    pattern = re.compile(".*".join(parts))
    return any(pattern.search(message) for message in source_messages())


def _messages(node: ast.AST) -> Iterator[str]:
    """Outermost texts of a tree."""
    if _is_text(node):
        yield _text(node)
        return
    for child in ast.iter_child_nodes(node):
        yield from _messages(child)


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ELLIPSIS
