"""Calibration text that stands on every machine that runs Python, so that a first run needs no data.

``prose`` is Python's language reference (the documents behind ``help()``), ``code`` the source of a
fixed list of standard library modules, ``mixed`` rows of both in equal number. The text differs
from one Python version to the next; the corpus' sha256, which the run record holds, tells them apart.
"""

from __future__ import annotations

import importlib.util
from importlib.abc import InspectLoader
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

from reap_stream.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEFAULT_BUILTIN = "mixed"
CODE_DOCUMENT_CHARS = 16_384

# Pure Python in every supported version, and none that the interpreter freezes without its source.
_CODE_MODULES = (
    *("argparse", "ast", "base64", "bdb", "calendar", "cmd", "configparser"),
    *("contextlib", "copy", "csv", "dataclasses", "difflib", "email.message", "enum", "fractions"),
    *("ftplib", "functools", "gettext", "heapq", "html.parser", "http.client", "inspect"),
    *("ipaddress", "json.decoder", "json.encoder", "logging.handlers", "mailbox", "optparse"),
    *("pdb", "plistlib", "pprint", "random", "shlex", "shutil", "socketserver", "statistics"),
    *("subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "traceback"),
    *("typing", "unittest.case", "urllib.parse", "uuid", "weakref"),
)


def prose_documents() -> Iterator[str]:
    """Yield the topics of Python's language reference in order of their names.

    Raises:
        CalibrationError: this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CalibrationError(
            "builtin:prose needs the module pydoc_data.topics, which this Python lacks: give a file"
        ) from error
    for name in sorted(topics):
        yield topics[name]


def code_documents() -> Iterator[str]:
    """Yield standard library source in documents of some 16,000 characters.

    A module that this Python lacks, or holds only compiled, is passed over.

    Raises:
        CalibrationError: none of the modules has source here.
    """
    found = False
    for name in _CODE_MODULES:
        source = _module_source(name)
        if source is not None:
            found = True
            yield from cut_source(source, CODE_DOCUMENT_CHARS)
    if not found:
        raise CalibrationError(
            "builtin:code needs the standard library's source, which this Python lacks: give a file"
        )


def cut_source(source: str, max_chars: int) -> Iterator[str]:
    """Cut Python source before top-level statements, as late as `max_chars` allows.

    A single top-level statement longer than `max_chars` stays whole. The pieces joined are `source`.
    """
    piece, statement = "", ""
    for line in source.splitlines(keepends=True):
        if not line[0].isspace() and statement:
            piece, whole = _grown(piece, statement, max_chars)
            if whole:
                yield whole
            statement = ""
        statement += line
    piece, whole = _grown(piece, statement, max_chars)
    yield from (text for text in (whole, piece) if text)


def _grown(piece: str, statement: str, max_chars: int) -> tuple[str, str]:
    """Return the piece with the statement, or a new piece and the one that is full."""
    if len(piece) + len(statement) <= max_chars:
        return piece + statement, ""
    return statement, piece


def _module_source(name: str) -> str | None:
    """Return a module's source; neither the module nor a package it lies in is imported."""
    package, _, submodule = name.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is not None and submodule:
        spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    if spec is None or not isinstance(spec.loader, InspectLoader):
        return None
    return spec.loader.get_source(name)


_DOCUMENTS: dict[str, tuple[Callable[[], Iterator[str]], ...]] = {
    "mixed": (prose_documents, code_documents),
    "prose": (prose_documents,),
    "code": (code_documents,),
}
BUILTIN_NAMES = tuple(_DOCUMENTS)


def builtin_parts(name: str) -> list[Iterator[str]]:
    """Return the streams of documents that a built-in text is mixed from in equal shares.

    Args:
        name: one of `BUILTIN_NAMES`.
    """
    return [documents() for documents in _DOCUMENTS[name]]
