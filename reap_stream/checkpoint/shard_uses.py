"""Steps of a job and the shards they read: fetched when they are wanted, let go when they are done.

Each job goes through its source in steps, most of them a layer. Which tensors a step reads follows
from the headers, so it is known beforehand in which steps a shard must be on the disk.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap_stream.checkpoint.providers import prefetch_files, release_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Uses:
    """The first and the last step in which a shard is read."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ShardOrder:
    """When each shard is read.

    Attributes:
        uses: by shard; those that nothing reads are left out.
        end: the last step.
    """

    uses: Mapping[Path, Uses]
    end: int

    @classmethod
    def of(cls, steps: Iterable[tuple[Path, int]], end: int) -> ShardOrder:
        """The order in which shards are read, of which some are read in several steps.

        Args:
            steps: shards and steps that read them.
            end: the last step.
        """
        found: dict[Path, list[int]] = defaultdict(list)
        for shard, step in steps:
            found[shard].append(step)
        uses = {shard: Uses(min(own), max(own)) for shard, own in found.items()}
        return cls(uses, end)

    def begin(self, step: int) -> None:
        """Sends for shards before the first step that is taken, in the order in which they are read.

        Where they are deleted after use, for those of that step and the next.
        """
        ahead = [item for item in self.uses.items() if item[1].last >= step]
        ahead.sort(key=lambda item: item[1].first)
        prefetch_files(shard for shard, uses in ahead if uses.first <= step + 1)
        prefetch_files((shard for shard, _ in ahead), lasting=True)

    def done(self, step: int) -> None:
        """Lets go of shards that are not read after a step, and sends for those of the next but one."""
        release_files(shard for shard, uses in self.uses.items() if uses.last <= step)
        prefetch_files(shard for shard, uses in self.uses.items() if uses.first == step + 2)

    def peak_nbytes(self, nbytes: Mapping[Path, int]) -> int:
        """The most bytes of shards that are on the disk at a time.

        While a step runs the shards of the next one are fetched already.

        Args:
            nbytes: of each shard what fetching it takes.
        """
        return max(
            (
                sum(
                    nbytes[shard]
                    for shard, uses in self.uses.items()
                    if uses.first <= step + 1 and uses.last >= step
                )
                for step in range(self.end + 1)
            ),
            default=0,
        )


@dataclass(frozen=True, slots=True)
class CopyOrder:
    """When each tensor is read by a job that copies or compares and runs nothing.

    Attributes:
        shards: when their shards are read.
        steps: source tensor → step; those that are left out of what is written are not there.
        whole: step → source tensors on which no choice of experts bears.
    """

    shards: ShardOrder
    steps: Mapping[str, int]
    whole: Mapping[int, Sequence[str]]
