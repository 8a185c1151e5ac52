"""Where the ranks of a job run, and which of them are gone as far as this machine can tell."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

# A process that dies closes its connections before the system shows it as dead; in between, drivers
# take back what it had on devices.
_DYING_SECONDS: Final = 3.0
_LOOK_SECONDS: Final = 0.02


class Terminated(KeyboardInterrupt):
    """The process was told to end, by SIGTERM; as an interrupt it passes by what handles errors."""


class Peer(NamedTuple):
    """Where a rank runs.

    Attributes:
        host: name of its machine.
        process: its process id there.
    """

    host: str
    process: int

    @classmethod
    def here(cls) -> Peer:
        """This process."""
        return cls(os.uname().nodename, os.getpid())

    @property
    def name(self) -> str:
        """For people."""
        return f"process {self.process} on {self.host}"


def on_machines(peers: Sequence[Peer]) -> tuple[tuple[int, ...], ...]:
    """The ranks of each machine, machines in the order of their first rank."""
    found: dict[str, list[int]] = {}
    for rank, peer in enumerate(peers):
        found.setdefault(peer.host, []).append(rank)
    return tuple(tuple(ranks) for ranks in found.values())


def gone_peers(peers: Sequence[Peer], own: int, seconds: float = _DYING_SECONDS) -> list[int]:
    """The ranks on this machine whose processes have ended.

    Args:
        peers: where each rank runs.
        own: this rank.
        seconds: how long to wait for one of them to have ended.
    """
    host = os.uname().nodename
    here = [rank for rank, peer in enumerate(peers) if peer.host == host and rank != own]
    until = time.monotonic() + seconds
    while here:
        gone = [rank for rank in here if _has_ended(peers[rank].process)]
        if gone or time.monotonic() >= until:
            return gone
        time.sleep(_LOOK_SECONDS)
    return []


def _has_ended(process: int) -> bool:
    """Whether there is no such process, or only its exit status for its parent to fetch."""
    try:
        os.kill(process, 0)
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except ProcessLookupError:
        return True
    except OSError:
        # Another user's, or a system that does not show its processes this way.
        return False
    return text.rpartition(")")[2].split()[0] in {"Z", "X"}
