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
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Terminated(KeyboardInterrupt):
    """The process was told to end, by SIGTERM; as an interrupt it passes by what handles errors."""


class Peer(NamedTuple):
    """Where a rank runs.

    Attributes:
        host: name of its machine.
        process: its process id there.
        boot: what this start of its system is called.
    """

    host: str
    process: int
    boot: str = ""

    @classmethod
    def here(cls) -> Peer:
        """This process."""
        return cls(os.uname().nodename, os.getpid(), _boot_id())

    @property
    def name(self) -> str:
        """For people."""
        return f"process {self.process} on {self.host}"

    @property
    def machine(self) -> str:
        """What its machine is told apart by: names may be those of an image, and all the same."""
        return f"{self.host} {self.boot}"


def on_machines(peers: Sequence[Peer]) -> tuple[tuple[int, ...], ...]:
    """The ranks of each machine, machines in the order of their first rank."""
    found: dict[str, list[int]] = {}
    for rank, peer in enumerate(peers):
        found.setdefault(peer.machine, []).append(rank)
    return tuple(tuple(ranks) for ranks in found.values())


def gone_peers(peers: Sequence[Peer], own: int, seconds: float = _DYING_SECONDS) -> list[int]:
    """The ranks on this machine whose processes have ended.

    Args:
        peers: where each rank runs.
        own: this rank.
        seconds: how long to wait for one of them to have ended.
    """
    machine = Peer(os.uname().nodename, os.getpid(), _boot_id()).machine
    here = [rank for rank, peer in enumerate(peers) if peer.machine == machine and rank != own]
    until = time.monotonic() + seconds
    while here:
        gone = [rank for rank in here if _has_ended(peers[rank].process)]
        if gone or time.monotonic() >= until:
            return gone
        time.sleep(_LOOK_SECONDS)
    return []


def _boot_id() -> str:
    """A number that the system draws when it starts; nothing where it does not tell."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


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
