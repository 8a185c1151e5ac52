"""MODEL of the command line: a directory as it is, or a model on the Hub behind one."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from reap_stream.errors import UsageError
from reap_stream.hub.names import HubName, parse_hub_name

# Where commands have models among their arguments.
_ARGUMENTS: Final = ("model", "source", "models")
_HEADERS_ONLY: Final = frozenset({"inspect", "plan"})
# What shards of an evaluation without a file are named after.
_EVALUATION: Final = "eval"
# As `pruning` writes it, which would import torch.
_RUN_FILE: Final = "reap/run.json"
_COMMIT: Final = re.compile("[0-9a-f]{40}")


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
    given = {key: getattr(arguments, key, None) for key in _ARGUMENTS}
    paths = [path for value in given.values() for path in _paths(value)]
    names = {path: parse_hub_name(str(path)) for path in paths}
    _check_evict(command, arguments, names)
    with ExitStack() as stack:
        found: dict[Path, Path] = {}
        for path, name in names.items():
            if name is not None:
                found[path] = _opened(stack, command, arguments, name, len(found))
        for key, value in given.items():
            if isinstance(value, Path):
                setattr(arguments, key, found.get(value, value))
            elif value is not None:
                setattr(arguments, key, [found.get(path, path) for path in value])
        yield


def _paths(value: Path | Sequence[Path] | None) -> Sequence[Path]:
    return [value] if isinstance(value, Path) else value or ()


def _check_evict(
    command: str, arguments: argparse.Namespace, names: dict[Path, HubName | None]
) -> None:
    if not getattr(arguments, "evict", False):
        return
    protect = getattr(arguments, "protect", "none")
    if command == "prune" and protect != "none":
        message = (
            f"--protect {protect} chooses experts when all layers are scored, and their shards are "
            f"deleted by then: give observe --evict, then compact --protect {protect}, or leave out "
            "--evict"
        )
        raise UsageError(message)
    if not any(names.values()):
        given = ", ".join(map(str, names))
        message = f"--evict: {given} is no model on the Hub, and no other files are ever deleted"
        raise UsageError(message)
    if _beside(command, arguments) is None:
        message = "--evict: say with --scratch or --output where shards may lie until they are read"
        raise UsageError(message)


def _opened(
    stack: ExitStack, command: str, arguments: argparse.Namespace, name: HubName, number: int
) -> Path:
    from reap_stream.hub.opening import Need, opened_hub_model

    beside = _beside(command, arguments) if getattr(arguments, "evict", False) else None
    opened = opened_hub_model(
        _pinned(name, arguments),
        Need.HEADERS if command in _HEADERS_ONLY else Need.SIDE_FILES,
        work=None if beside is None else work_directory(beside, number),
        code=getattr(arguments, "trust_remote_code", False),
    )
    return stack.enter_context(opened)


def _beside(command: str, arguments: argparse.Namespace) -> Path | None:
    """The path beside which shards lie that are deleted after use; None: the user named none."""
    if command == "verify":
        directory: Path = arguments.directory
        return directory
    scratch: Path | None = getattr(arguments, "scratch", None)
    if scratch is not None:
        return scratch / _EVALUATION
    output: Path | None = arguments.output
    return output


def work_directory(beside: Path, number: int = 0) -> Path:
    """Where shards lie that are deleted after use: beside an output, on its disk.

    Args:
        beside: the output.
        number: of the model, where a command has several.
    """
    more = f"-{number + 1}" if number else ""
    return beside.absolute().parent / f".{beside.name}.reap-source{more}"


def _pinned(name: HubName, arguments: argparse.Namespace) -> HubName:
    """The commit that a half-done job was begun with, or that what is verified was made of."""
    if hasattr(arguments, "source") and name.revision is None:
        return _recorded(name, arguments.directory)
    if not getattr(arguments, "resume", False) or _COMMIT.fullmatch(name.revision or ""):
        return name
    from reap_stream.checkpoint.job import stored_settings

    begun = parse_hub_name(str((stored_settings(arguments.output) or {}).get("model")))
    if begun is None or begun.repository != name.repository:
        return name
    if name.revision is not None:
        note = f"note: --resume goes on at {begun}, wherever {name.revision} is by now"
        print(note, file=sys.stderr)  # noqa: T201 - this is the command line
    return begun


def _recorded(name: HubName, directory: Path) -> HubName:
    """The commit that a pruned checkpoint's record names, wherever the branch is by now."""
    try:
        record = json.loads((directory / _RUN_FILE).read_text(encoding="utf-8"))
        source = record["source"]
        begun = parse_hub_name(f"{source['repository']}@{source['revision']}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return name
    return begun if begun is not None and begun.repository == name.repository else name
