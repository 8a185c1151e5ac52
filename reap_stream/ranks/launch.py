"""Whether a launcher such as torchrun started this process as one of several, and as which.

Told by the environment that torch.distributed's launchers share. No torch at import: commands that
do not run in several processes are refused before anything is loaded.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from io import StringIO
from typing import TYPE_CHECKING, Final

from reap_stream.errors import UsageError, mark_told
from reap_stream.ranks.base import ALONE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from reap_stream.ranks.base import Ranks

SHARED_COMMANDS: Final = ("prune", "observe")
"""Commands that several processes can do together."""
DEFAULT_PATIENCE: Final = 30.0
"""Minutes after which a rank that does not answer counts as gone."""

_NEEDED: Final = ("MASTER_ADDR", "MASTER_PORT")
# Longer than the first rank may take to start after the others, on a busy machine or disk.
_SILENT_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Place:
    """A process among those that were launched together.

    Attributes:
        rank: its number.
        size: how many there are.
        local_rank: its number among those that one launcher started on this machine; None: the
            launcher does not say.
        local_size: how many these are, or None.
    """

    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    local_size: int | None = None


def launched_place(environment: Mapping[str, str] = os.environ) -> Place:
    """This process' place; the only one where no launcher speaks of several.

    Raises:
        UsageError: the environment contradicts itself.
    """
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank is None or size is None or size == 1:
        return Place()
    local_rank = _number(environment, "LOCAL_RANK")
    local_size = _number(environment, "LOCAL_WORLD_SIZE")
    missing = [name for name in _NEEDED if not environment.get(name)]
    outside = local_rank is not None and local_size is not None and local_rank >= local_size
    if rank >= size or outside or missing:
        here = f", on its machine {local_rank} of {local_size}" if outside else ""
        lacking = f"; {' and '.join(missing)} not set" if missing else ""
        message = (
            f"the environment names rank {rank} of {size}{here}{lacking}: start with torchrun, or "
            "unset RANK and WORLD_SIZE to run alone"
        )
        raise UsageError(message)
    return Place(rank, size, local_rank, local_size)


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that prints, of those that were launched together."""
    return environment.get("RANK", "0") == "0" or environment.get("WORLD_SIZE", "1") == "1"


@contextmanager
def speaking_once() -> Iterator[None]:
    """Lets one rank print what all of them would, for the length of a block before they meet."""
    if speaks():
        yield
        return
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    except SystemExit as end:
        if end.code:
            _let_first_speak()
        raise


def _let_first_speak() -> None:
    """Waits, in a rank that fails without a word.

    Launchers end all ranks as soon as one has failed. If that were this one, the first could be
    ended before it has told anybody what is wrong.
    """
    time.sleep(_SILENT_SECONDS)


def check_command(command: str, place: Place, *, evict: bool = False) -> None:
    """Refuses a command that several processes cannot do together.

    Args:
        command: its name.
        place: this process' place.
        evict: shards of the source are to be deleted when they were read.

    Raises:
        UsageError: it is one of these, and there are several.
    """
    message = ""
    if place.size > 1 and command not in SHARED_COMMANDS:
        message = (
            f"{command} runs in one process, and {place.size} were started together: start it "
            f"without torchrun (several can do {' and '.join(SHARED_COMMANDS)}), or unset RANK and "
            "WORLD_SIZE where something else set them"
        )
    elif place.size > 1 and evict:
        message = (
            "--evict deletes shards once one process has read them, and the others may not have: "
            "leave it out, or run one process"
        )
    if not message:
        return
    error = UsageError(message)
    if place.rank:
        mark_told(error)
        _let_first_speak()
    raise error


@contextmanager
def open_ranks(place: Place, patience: float = DEFAULT_PATIENCE) -> Iterator[Ranks]:
    """The ranks of this process' job, for as long as it runs.

    Args:
        place: this process' place among them.
        patience: minutes after which a rank that does not answer counts as gone.

    Raises:
        UsageError: `patience` is no time.
        RankLostError: the ranks do not find each other.
    """
    if place.size == 1:
        yield ALONE
        return
    if not patience > 0:
        message = f"--rank-patience is {patience}, must be more than 0 minutes"
        raise UsageError(message)
    from reap_stream.ranks.group import RankGroup

    with RankGroup(place, timedelta(minutes=patience)) as group:
        yield group


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    if not text.isdecimal():
        message = f"{name} is {text!r} in the environment, and a launcher gives a number there"
        raise UsageError(message)
    return int(text)
