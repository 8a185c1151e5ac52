"""MODEL of the command line: a directory as it is, or a model on the Hub behind one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from reap_stream.errors import UsageError
from reap_stream.hub.names import HubName, parse_hub_name

# Where commands have models among their arguments.
_ARGUMENTS: Final = ("model", "source", "models")
_HEADERS_ONLY: Final = frozenset({"inspect", "plan"})


@contextmanager
def local_sources(command: str, arguments: argparse.Namespace) -> Iterator[None]:
    """Puts a directory in the place of each model on the Hub, for the length of a command.

    Args:
        command: its name; `inspect` and `plan` fetch no weights.
        arguments: as parsed; models in them become directories.

    Raises:
        CheckpointError: a model cannot be had.
        UsageError: `--evict` cannot be carried out.
    """
    _check_evict(command, arguments)
    with ExitStack() as stack:
        for key in _ARGUMENTS:
            given = getattr(arguments, key, None)
            if isinstance(given, Path):
                setattr(arguments, key, _opened(stack, command, arguments, given))
            elif given is not None:
                paths = [_opened(stack, command, arguments, path) for path in given]
                setattr(arguments, key, paths)
        yield


def _check_evict(command: str, arguments: argparse.Namespace) -> None:
    protect = getattr(arguments, "protect", "none")
    if command == "prune" and getattr(arguments, "evict", False) and protect != "none":
        message = (
            f"--protect {protect} chooses experts when all layers are scored, and their shards are "
            f"deleted by then: give observe --evict, then compact --protect {protect}, or leave out "
            "--evict"
        )
        raise UsageError(message)


def _opened(
    stack: ExitStack, command: str, arguments: argparse.Namespace, given: Path
) -> Path:  # fmt: skip
    name = parse_hub_name(str(given))
    evict = getattr(arguments, "evict", False)
    if name is None:
        if evict:
            message = (
                f"--evict: {given} is no model on the Hub, and no other files are ever deleted"
            )
            raise UsageError(message)
        return given
    from reap_stream.hub.opening import Need, opened_hub_model

    need = Need.HEADERS if command in _HEADERS_ONLY else Need.SIDE_FILES
    opened = opened_hub_model(
        _pinned(name, arguments),
        need,
        work=work_directory(arguments.output) if evict else None,
        code=getattr(arguments, "trust_remote_code", False),
    )
    return stack.enter_context(opened)


def work_directory(output: Path) -> Path:
    """Where shards lie that are deleted after use: beside the output, on its disk."""
    return output.absolute().parent / f".{output.name}.reap-source"


def _pinned(name: HubName, arguments: argparse.Namespace) -> HubName:
    """The commit that a half-done job was begun with, where `--resume` goes on with it."""
    if not getattr(arguments, "resume", False) or name.revision is not None:
        return name
    from reap_stream.checkpoint.job import stored_settings

    begun = parse_hub_name(str((stored_settings(arguments.output) or {}).get("model")))
    return begun if begun is not None and begun.repository == name.repository else name
