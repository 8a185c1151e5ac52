"""Calibration text that the package ships, the same bytes on every machine, for a first run.

    code      modules of Python's standard library, in documents of some 8,000 characters
    prose     addresses of American presidents and chapters of "Moby Dick"
    tools     conversations that call tools
    chat      conversations of a user and an assistant, some with reasoning
    mixed     rows of all four in equal number; for a tokenizer without a chat template, which has
              no form for conversations, rows of code and prose

The files lie in ``reap_stream/data/builtin``, their licences beside them. The script
``benchmarks/make_builtin.py`` makes them. It is far less text than good calibration needs, and none
of a user's own domain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

DEFAULT_BUILTIN: Final = "mixed"
DOCUMENTS: Final = ("code", "prose")
CONVERSATIONS: Final = ("tools", "chat")
BUILTIN_NAMES: Final = (DEFAULT_BUILTIN, *DOCUMENTS, *CONVERSATIONS)

_DIRECTORY: Final = Path(__file__).parents[1] / "data" / "builtin"


def builtin_parts(name: str, *, chat: bool) -> tuple[str, ...]:
    """Return the parts that a built-in text is mixed from in equal shares.

    Args:
        name: one of `BUILTIN_NAMES`.
        chat: whether the tokenizer has a chat template.

    Returns:
        Some of `DOCUMENTS` and `CONVERSATIONS`; nothing where all that is asked for needs a
        chat template.
    """
    wanted = (*DOCUMENTS, *CONVERSATIONS) if name == DEFAULT_BUILTIN else (name,)
    return tuple(part for part in wanted if chat or part in DOCUMENTS)


def builtin_path(part: str) -> Path:
    """Return the ``.jsonl`` file of one of `DOCUMENTS` and `CONVERSATIONS`."""
    return _DIRECTORY / f"{part}.jsonl"
