"""What a model's own code fails with, told as such: in one line that says where.

Layers, embeddings and heads run code that is transformers' or the checkpoint's own. Where it raises,
for a config.json that it was not made for or a version that it does not know, a traceback through
three packages says less than its last line and its place.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import PurePath

from reap_stream.errors import ReapStreamError
from reap_stream.exhaustion import exhausted_memory


@contextmanager
def own_code(what: str, raises: type[ReapStreamError]) -> Iterator[None]:
    """Runs a model's own code.

    Args:
        what: names the code, for the message.
        raises: the error to raise in place of another.

    Raises:
        ReapStreamError: of class `raises`; the code raised something else. Errors of this package,
            and want of memory, are raised as they are.
    """
    try:
        yield
    except (ReapStreamError, AssertionError):
        raise
    except Exception as error:
        if exhausted_memory(error) is not None:
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = (
            f"{what}: its own code fails: {type(error).__name__}: {error} "
            f"({PurePath(last.filename).name}, line {last.lineno}, {last.name}; "
            f"transformers {version('transformers')}): does config.json fit this version?"
        )
        raise raises(message) from error
