"""What a job needs of the processes that share it; a job of one process has `ALONE`."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Ranks(ABC):
    """The processes of one job, seen from one of them.

    Attributes:
        rank: this process' number; rank 0 leads: it keeps the job's records and speaks to people.
        machines: the ranks of each machine; every rank is in one of them.
        local_rank: this process' number among those that its launcher started together.
        local_size: how many these are.
    """

    rank: int
    machines: tuple[tuple[int, ...], ...]
    local_rank: int
    local_size: int

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return sum(len(machine) for machine in self.machines)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def on_this_machine(self) -> int:
        """How many ranks share this machine's memory."""
        return next(len(machine) for machine in self.machines if self.rank in machine)

    @abstractmethod
    def gather(self, message: bytes) -> list[bytes]:
        """Gives every rank what each of them gives, by rank; waits for all of them.

        Raises:
            RankError: another rank failed.
            RankLostError: another rank is gone.
        """

    def share(self, value: Any) -> list[Any]:
        """`gather` of a value that JSON knows."""
        return [json.loads(message) for message in self.gather(json.dumps(value).encode())]

    def first(self, value: Any) -> Any:
        """What rank 0 gives; the others' values are not looked at."""
        message = json.dumps(value).encode() if self.leads else b""
        return json.loads(self.gather(message)[0])

    def by_first(self, step: Callable[[], Any]) -> Any:
        """Lets rank 0 take a step while the others wait; gives all what it gave, a JSON value."""
        return self.first(step() if self.leads else None)

    def wait_for_all(self) -> None:
        """Waits until every rank has come here."""
        self.gather(b"")


class Alone(Ranks):
    """The one rank of a job of one process."""

    rank = 0
    machines = ((0,),)
    local_rank = 0
    local_size = 1

    def gather(self, message: bytes) -> list[bytes]:
        """What it gives itself."""
        return [message]


ALONE: Final = Alone()


def say_of(values: Sequence[Any]) -> str:
    """Numbers of ranks, or of anything, for people: ``0, 2 and 5``."""
    texts = [str(value) for value in values]
    return " and ".join(part for part in (", ".join(texts[:-1]), *texts[-1:]) if part)
