"""What memory this process has, had and may come to have, as the system tells it."""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path
from typing import Final

import torch

from reap_stream.control_groups import free_in_groups

USABLE_SHARE: Final = 0.8
"""Part of what is free that is planned with: what others take meanwhile must fit in the rest."""


def resident_nbytes() -> int:
    """Resident memory of this process now, in bytes; the peak where the system does not say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_resident_nbytes()
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_nbytes() -> int:
    """Largest resident memory this process ever had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            # Not `ru_maxrss`: that begins with the memory of the process that started this one.
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_nbytes(sharers: int = 1) -> int:
    """Host memory this process may come to use: most of what is free, within its control groups.

    Args:
        sharers: processes that divide what is free, this one counted.
    """
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    allowed = free_in_groups()
    free = free if allowed is None else min(free, allowed)
    return int(free * USABLE_SHARE) // sharers + resident_nbytes()


def peak_device_nbytes() -> int:
    """Largest memory this process ever had allocated on one device, in bytes; 0 without one."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # torch does not type it
        return 0
    devices = range(torch.cuda.device_count())
    return max((int(torch.cuda.max_memory_allocated(device)) for device in devices), default=0)


def gib(nbytes: int) -> str:
    """A number of bytes for people: ``3.25 GiB``."""
    return f"{nbytes / 2**30:.2f} GiB"


def enough_gib(nbytes: int) -> str:
    """As `gib`, but never less than `nbytes`: what is printed can be given as a budget."""
    return f"{math.ceil(nbytes / 2**30 * 100) / 100:.2f} GiB"
