"""Several ranks on torch.distributed: one kind of exchange, and what happens when a rank drops out.

Every exchange is a round in which each rank gives bytes, or the error it failed with. So a failing
rank needs not know what the others wait for, and all of them learn of it in the round they are in.

Of a rank that died the others learn by their connections to it. Which one it was, the system tells
where it ran on the same machine. Whoever notices first says it for all on its machine: launchers
end the others soon after.

Messages are JSON and safetensors, never pickles: what comes in can be wrong, but it is not code.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from reap_stream.errors import RankError, RankLostError, ReapStreamError, mark_told
from reap_stream.exhaustion import exhausted_memory
from reap_stream.ranks.base import Ranks, say_of
from reap_stream.ranks.peers import Peer, Terminated, gone_peers, on_machines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta
    from types import FrameType, TracebackType

    import torch
    from typing_extensions import Self

    from reap_stream.ranks.launch import Place

_FAILED: Final = 1
# A store that does not answer must not keep a rank from ending.
_LAST_WORDS_SECONDS: Final = 5


class RankGroup(Ranks):
    """This process among the ranks of a job; a context manager for the length of the job.

    When it ends with an error, SIGTERM stays ignored: the process has something to say and ends.

    Args:
        place: which of them it is.
        patience: after this time a rank that does not answer counts as gone.
    """

    def __init__(self, place: Place, patience: timedelta) -> None:
        self._place = place
        self.rank = place.rank
        # Until they have met, as if on one machine.
        self._settle([Peer.here()] * place.size)
        self._peers: list[Peer] = []
        self._patience = patience
        self._store: Any = None
        self._before: Any = None

    def __enter__(self) -> Self:
        """Meets the others.

        Raises:
            RankLostError: some of them do not come.
        """
        from torch import distributed
        from torch.distributed.rendezvous import rendezvous

        self._before = signal.signal(signal.SIGTERM, _terminate)
        try:
            self._store, _, _ = next(rendezvous("env://", timeout=self._patience))
            distributed.init_process_group(
                "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=self._patience,
            )
        except (RuntimeError, ValueError) as error:
            cause = next(iter(str(error).splitlines()), "")
            meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            message = (
                f"rank {self.rank} of {self.size} cannot reach the others at {meeting}: "
                f"{cause}; it must be rank 0's machine, and where machines have several networks "
                "GLOO_SOCKET_IFNAME must name the one that joins them"
            )
            raise RankLostError(message) from error
        self._peers = [Peer(*found) for found in self.share(Peer.here())]
        self._settle(self._peers)
        return self

    def _settle(self, peers: Sequence[Peer]) -> None:
        """Takes in where everyone runs; what the launcher said of this machine goes before."""
        self.machines = on_machines(peers)
        here = next(machine for machine in self.machines if self.rank in machine)
        # Each machine has a launcher, and a terminal or log, of its own.
        self._speaks = self.rank == here[0]
        place = self._place
        self.local_rank = here.index(self.rank) if place.local_rank is None else place.local_rank
        self.local_size = len(here) if place.local_size is None else place.local_size

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Parts from the others, in a last round unless they know already."""
        from torch import distributed

        try:
            self._part(error)
        finally:
            with suppress(RuntimeError):
                distributed.destroy_process_group()
            after = self._before or signal.SIG_DFL
            signal.signal(signal.SIGTERM, after if error is None else signal.SIG_IGN)

    def gather(self, message: bytes) -> list[bytes]:
        """See `Ranks.gather`; all ranks must come here as often as each other."""
        failed, messages = self._round(message, failed=False)
        if failed:
            self._leave()
            raise self._error_of(failed, messages)
        return messages

    def _round(self, message: bytes, *, failed: bool) -> tuple[list[int], list[bytes]]:
        """The ranks that failed, and what each gives: its error if it did."""
        heads = self._all_gather(np.array([int(failed), len(message)], dtype=np.int64))
        longest = max(int(head[1]) for head in heads)
        # torch gathers only what is equally long.
        padded = np.zeros(max(longest, 1), dtype=np.uint8)
        padded[: len(message)] = np.frombuffer(message, dtype=np.uint8)
        bodies = self._all_gather(padded)
        messages = [
            body[: int(head[1])].tobytes() for head, body in zip(heads, bodies, strict=True)
        ]
        return [rank for rank, head in enumerate(heads) if head[0] == _FAILED], messages

    def _all_gather(self, values: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        import torch
        from torch import distributed

        own = torch.from_numpy(values)
        found: list[torch.Tensor] = [torch.empty_like(own) for _ in range(self.size)]
        try:
            distributed.all_gather(found, own)
        except RuntimeError as error:
            self._leave()
            self._lose(error)
        return [tensor.numpy() for tensor in found]

    def _error_of(self, failed: list[int], messages: list[bytes]) -> RankError:
        rank = failed[0]
        told = json.loads(messages[rank])
        error = RankError(f"{self._name(rank)}: {told['text']}")
        error.exit_code, error.resumable = told["exit_code"], told["resumable"]
        return error

    def _name(self, rank: int) -> str:
        peer = self._peers[rank] if self._peers else None
        return f"rank {rank}" if peer is None else f"rank {rank} ({peer.name})"

    def _lose(self, error: BaseException | None) -> NoReturn:
        """Says as much as can be known of a rank that is gone."""
        gone = gone_peers(self._peers, self.rank)
        if gone:
            verb = "is" if len(gone) == 1 else "are"
            what = f"{say_of([self._name(rank) for rank in gone])} {verb} gone"
        elif "timed out" in str(error).lower():
            minutes = self._patience.total_seconds() / 60
            what = f"a rank did not answer within {minutes:g} minutes (--rank-patience)"
        else:
            what = "the connection to another rank was lost"
            elsewhere = sorted({peer.host for peer in self._peers} - {os.uname().nodename})
            what += f"; ranks run on {say_of(elsewhere)} too" if elsewhere else ""
        raise RankLostError(f"{what}, so the job cannot go on; finished layers are kept") from error

    def _part(self, error: BaseException | None) -> None:
        """Tells the others of an error, and marks it where another rank tells people of it."""
        try:
            if error is None:
                self.wait_for_all()
                return
            if isinstance(error, Terminated) and gone_peers(self._peers, self.rank, 0.0):
                self._leave()
                self._lose(error)
        except (RankError, RankLostError) as late:
            self._mark(late)
            raise
        self._mark(error)

    def _mark(self, error: BaseException) -> None:
        lost = isinstance(error, RankLostError) or not isinstance(error, Exception)
        if lost:
            told = not self._speaks_first()
        else:
            known = isinstance(error, RankError) or self._tell(error)
            told = known and not self._speaks
        if told:
            mark_told(error)

    def _tell(self, error: BaseException) -> bool:
        """Gives an error as this rank's part of the round the others are in, or come to."""
        own = isinstance(error, ReapStreamError)
        other = exhausted_memory(error) or f"{type(error).__name__}: {error}"
        text = str(error) if own else other
        facts = {
            "text": text,
            "exit_code": error.exit_code if isinstance(error, ReapStreamError) else 1,
            "resumable": error.resumable if isinstance(error, ReapStreamError) else True,
        }
        try:
            self._round(json.dumps(facts).encode(), failed=True)
        except ReapStreamError:
            return False
        self._leave()
        return True

    def _speaks_first(self) -> bool:
        """Whether no other rank of this machine has told people yet that the job ends."""
        from datetime import timedelta

        # Without torchrun the store is rank 0's, and asking it in vain fills the terminal.
        outlives = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if not outlives and 0 in gone_peers(self._peers, self.rank, 0.0):
            return True
        try:
            self._store.set_timeout(timedelta(seconds=_LAST_WORDS_SECONDS))
            return int(self._store.add(f"reap-stream/spoken/{Peer.here().machine}", 1)) == 1
        except (RuntimeError, AttributeError):
            return True

    def _leave(self) -> None:
        """This rank ends by itself: that a launcher ends it too must not cut off its last words."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    message = "ended by SIGTERM, which launchers send when another rank has ended"
    raise Terminated(message)
