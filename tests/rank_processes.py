"""Runs a command line in several ranks, one of which may be stopped at its n-th step.

The ranks are forked from the server of `killing`, and find each other through a store that the test
holds, as torchrun's agent does: it outlives every rank. The test's own process is none of them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from reap_stream.ranks import peers
from tests import killing

PATIENCE_SECONDS = 120.0


@contextmanager
def rank_environments(size):
    """The environment of each of `size` ranks; the store they meet at lives as long as this."""
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    yield [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def run_ranks(
    arguments: Sequence[str] | Sequence[Sequence[str]],
    log: Path,
    size: int,
    *,
    stop: tuple[int, int] | None = None,
    with_signal: int = signal.SIGKILL,
    prepare: Callable[[int], None] | None = None,
) -> list[int]:
    """Runs a command line in `size` ranks; their exit statuses, negative where a signal ended one.

    Args:
        arguments: of `reap-stream`, the same for all ranks or those of each.
        log: a sibling of it receives what each rank prints; see `printed`.
        size: how many ranks.
        stop: a rank, and its step at which it gets the signal; 0: it counts its steps.
        with_signal: the signal.
        prepare: is called in each rank's process, with its number, before the command.
    """
    each = [arguments] * size if isinstance(arguments[0], str) else arguments
    processes = []
    with rank_environments(size) as environments:
        for rank, environment in enumerate(environments):
            stop_at = None
            if stop is not None and stop[0] == rank:
                stop_at = stop[1] or killing.NEVER
            given = environment, list(each[rank]), _log(log, rank), (stop_at, int(with_signal))
            processes.append(killing._SERVER.Process(target=_rank, args=(*given, prepare)))
            processes[-1].start()
        until = time.monotonic() + PATIENCE_SECONDS
        for rank, process in enumerate(processes):
            if with_signal != signal.SIGSTOP or stop is None or stop[0] != rank:
                process.join(max(0.0, until - time.monotonic()))
        if with_signal == signal.SIGSTOP:
            processes[stop[0]].kill()
            processes[stop[0]].join()
        statuses = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
    assert None not in statuses, f"a rank hangs: {statuses}: {printed(log, size)}"
    return statuses


def printed(log, size):
    """What each rank printed."""
    return [Path(_log(log, rank)).read_text(encoding="utf-8") for rank in range(size)]


def steps_of(log, rank):
    """How many steps a rank took that counted them."""
    return int(Path(_log(log, rank)).with_suffix(".steps").read_text(encoding="utf-8"))


def on_two_machines(rank):
    """Lets every second rank take itself to be on another machine."""
    peers.Peer.here = classmethod(lambda cls: cls(("even", "odd")[rank % 2], os.getpid()))


def _log(log, rank):
    return str(log.with_name(f"{log.name}-{rank}.log"))


def _rank(environment, arguments, log, stop, prepare):
    os.environ.update(environment)
    if prepare is not None:
        prepare(int(environment["RANK"]))
    killing._child(arguments, log, *stop)
