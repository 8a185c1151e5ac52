"""Room on every disk for all jobs together, before the first one starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_stream.batch.job import Job
from reap_stream.checkpoint.disk import free_nbytes, on_one_disk
from reap_stream.errors import NoRoomError


@dataclass(frozen=True, slots=True)
class _Demand:
    """What a job takes of a disk: for good, or only while it runs."""

    name: str
    path: Path
    nbytes: int
    passing_nbytes: int = 0


def check_room(planned: Sequence[tuple[Job, Mapping[str, Any]]]) -> None:
    """Refuses a batch whose outputs and downloads, all of them, have no room on their disks.

    Args:
        planned: jobs that were not begun, and what is planned of each.

    Raises:
        NoRoomError: a disk has less room than is needed.
    """
    left = _demands(planned)
    while left:
        here = [demand for demand in left if on_one_disk(demand.path, left[0].path)]
        left = [demand for demand in left if demand not in here]
        # Jobs run one after another: what passes is there once at a time.
        needed = sum(demand.nbytes for demand in here)
        needed += max(demand.passing_nbytes for demand in here)
        free = free_nbytes(here[0].path)
        if needed > free:
            names = ", ".join(dict.fromkeys(demand.name for demand in here))
            raise NoRoomError(
                f"jobs {names}: {needed:,} bytes are needed, {free:,} are free at"
                f" {here[0].path.parent}: make room, or divide the jobs"
            )


def _demands(planned: Sequence[tuple[Job, Mapping[str, Any]]]) -> list[_Demand]:
    found, downloads = [], dict[str, _Demand]()
    for job, plan in planned:
        found.append(_Demand(job.name, job.output, plan["disk_nbytes"], plan["passing_nbytes"]))
        if plan["download_nbytes"]:
            # Fetched once for all jobs of a model.
            demand = _Demand(job.name, Path(plan["cache"]), plan["download_nbytes"])
            downloads.setdefault(plan["cache"], demand)
    return [*found, *downloads.values()]
