"""Runs a command in a process of its own that is killed, or interrupted, at its n-th step.

A step is the begin or the end of one call that changes something on the disk. The process is
forked from a server that has imported everything, so a run costs no more than its work.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from reap_stream import cli, finishing, pipeline, shared_job
from reap_stream.calibration.activations import HiddenStates
from reap_stream.checkpoint import job, publish
from reap_stream.checkpoint.job import Job
from reap_stream.checkpoint.journal import Journal
from reap_stream.checkpoint.output import OutputWriter

# Every place where a job changes the disk.
STEPS: list[tuple[Any, str]] = [
    (Journal, "append"),
    (OutputWriter, "allocate"),
    (OutputWriter, "write"),
    (OutputWriter, "sync"),
    (HiddenStates, "save"),
    (Job, "create"),
    (Job, "discard"),
    (shared_job, "_check_shared"),
    (pipeline, "save_scores"),
    (finishing, "save_scores"),
    (finishing, "publish"),
    (publish, "_swap_in"),
    (publish, "remove"),
    (job, "remove"),
]

NEVER = 10**9

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.killing"])


def run(
    arguments: Sequence[str],
    log: Path,
    *,
    stop_at: int | None = None,
    with_signal: int = signal.SIGKILL,
) -> int:
    """Runs a command line; its exit status, negative where a signal ended it.

    Args:
        arguments: of `reap-stream`.
        log: receives what the command prints.
        stop_at: the step at which the process gets the signal; None: never.
        with_signal: the signal.
    """
    process = _SERVER.Process(
        target=_child, args=(list(arguments), str(log), stop_at, int(with_signal))
    )
    process.start()
    process.join(120)
    status = process.exitcode
    assert status is not None, "the command hangs"
    process.close()
    return status


def count_steps(arguments: Sequence[str], log: Path) -> int:
    """Runs a command line to its end; the number of steps it took."""
    assert run(arguments, log, stop_at=NEVER) == 0, log.read_text(encoding="utf-8")
    return int(log.with_suffix(".steps").read_text(encoding="utf-8"))


def _child(arguments: list[str], log: str, stop_at: int | None, number: int) -> None:
    torch.set_num_threads(1)
    # Ignored where the tests run in the background of a script, and inherited from there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = [0] if stop_at is None else _arm(stop_at, number)
    with (
        Path(log).open("w", encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        status = cli.main(arguments)
    Path(log).with_suffix(".steps").write_text(str(seen[0]), encoding="utf-8")
    sys.exit(status)


def _arm(stop_at: int, number: int) -> list[int]:
    lock, seen = threading.Lock(), [0]

    def step() -> None:
        with lock:
            seen[0] += 1
            if seen[0] == stop_at:
                os.kill(os.getpid(), number)

    for owner, name in STEPS:
        plain = owner.__dict__[name]
        if isinstance(plain, classmethod):
            setattr(owner, name, classmethod(_watched(plain.__func__, step)))
        else:
            setattr(owner, name, _watched(plain, step))
    return seen


def _watched(call: Callable[..., Any], step: Callable[[], None]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        step()
        result = call(*args, **kwargs)
        step()
        return result

    return watched
