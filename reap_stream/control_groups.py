"""What the control groups of this process let it have (Linux, version 2): containers, slices, jobs.

Each group on the way from the process's own to the root may have a limit, `memory.max`, on what all
of its processes hold together, `memory.current`. Pages of files count there too, and are given back
where memory is short; those of a memory file system are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_GIVEN_BACK = ("inactive_file", "active_file")


def free_in_groups(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Bytes that this process's groups still have room for; None without a limit that can be read.

    Args:
        root: where groups are mounted.
        own: the file that names the process's group.
    """
    return min((free for group in _groups(root, own) for free in _free(group)), default=None)


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """The process's group and those around it; in a container its own is the root."""
    try:
        lines = own.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    path = PurePosixPath(name.lstrip("/"))
    yield from (root / part for part in (path, *path.parents) if ".." not in part.parts)


def _free(group: Path) -> Iterator[int]:
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if not limit.isdigit():
            return
        held = int((group / "memory.current").read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        counts = {key: int(value) for key, value in (line.split() for line in stat)}
    except (OSError, ValueError):
        return
    given_back = sum(counts.get(key, 0) for key in _GIVEN_BACK)
    yield max(0, int(limit) - max(0, held - given_back))
