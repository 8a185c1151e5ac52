"""Hidden states saved now and then, so that a stopped pass need not begin at the first layer.

Every rank saves those of its own rows. An older snapshot goes only when all ranks have saved a newer
one, so whenever the job stops there is a layer before which all of them, or none, can go on. Of a
job with another number of ranks a snapshot is of no use, since it has dealt the rows in another way.
"""

from __future__ import annotations

import time
from pathlib import Path

from reap_stream.checkpoint.disk import output_errors
from reap_stream.forward import ForwardPass
from reap_stream.ranks.base import ALONE, Ranks


class Snapshots:
    """The snapshots of one rank.

    Args:
        directory: where they lie.
        seconds: least time between two.
        ranks: the ranks.
    """

    def __init__(self, directory: Path, seconds: float, ranks: Ranks = ALONE) -> None:
        self._directory = directory
        self._seconds = seconds
        self._ranks = ranks
        self._last = time.monotonic()

    def restore(self, forward: ForwardPass) -> int:
        """Takes up the latest snapshot that all ranks have; the layer to go on with, 0 for none.

        Raises:
            ResumeError: it is damaged.
        """
        own = [int(path.stem.rpartition("-")[2]) for path in self._saved(self._name("*"))]
        common = set.intersection(*map(set, self._ranks.share(own)))
        layer = max(common, default=0)
        if layer:
            forward.states.restore(self._directory / self._name(str(layer)))
        return layer

    def is_due(self) -> bool:
        """Whether enough time went by, as rank 0 counts it."""
        return bool(self._ranks.first(time.monotonic() - self._last >= self._seconds))

    def save(self, forward: ForwardPass, layer: int) -> None:
        """Saves the states that go into `layer`.

        Raises:
            OutputError: the disk has no room for them.
        """
        path = self._directory / self._name(str(layer))
        forward.states.save(path, layer=layer)
        self._ranks.wait_for_all()
        # Rank 0 also deletes what a job with another number of ranks has left.
        old = self._saved("*layer-*.safetensors" if self._ranks.leads else self._name("*"))
        current = self._name(str(layer), "*")
        with output_errors(self._directory):
            for other in old:
                if not other.match(current):
                    other.unlink(missing_ok=True)
        self._last = time.monotonic()

    def _name(self, layer: str, rank: str | None = None) -> str:
        """The name of a snapshot's file."""
        if self._ranks.size == 1:
            return f"layer-{layer}.safetensors"
        number = str(self._ranks.rank) if rank is None else rank
        return f"rank-{number}-of-{self._ranks.size}.layer-{layer}.safetensors"

    def _saved(self, pattern: str) -> list[Path]:
        return sorted(self._directory.glob(pattern))
