"""A job whose batch was killed a moment ago still puts its things in order: it is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from reap_stream.checkpoint.job import job_directory
from reap_stream.checkpoint.lock import Lock
from reap_stream.errors import UsageError

_PATIENCE_SECONDS: Final = 60.0
_PAUSE_SECONDS: Final = 0.2


def wait_for_job(output: Path, say: Callable[[str], None]) -> None:
    """Waits until nobody works on a half-done job, for a minute at most.

    Args:
        output: the job's output.
        say: tells people what is waited for.

    Raises:
        UsageError: somebody still does; the message names the process.
    """
    lock = job_directory(output.resolve()) / "lock"
    end, told = time.monotonic() + _PATIENCE_SECONDS, False
    while lock.exists():
        holder = _holder(lock)
        if holder is None:
            return
        if time.monotonic() > end:
            raise holder
        if not told:
            say(f"waiting: {holder}")
        told = True
        time.sleep(_PAUSE_SECONDS)


def _holder(lock: Path) -> UsageError | None:
    """What is to say of the lock's holder; None: there is none."""
    try:
        Lock.acquire(lock).release()
    except UsageError as error:
        return error
    return None
