"""Ctrl-C must not wait for a shard.

The exception unwinds from the inside out, and on its way threads are joined that may be waiting
for a download of many minutes (the one that reads experts ahead). What could end the download is
closed last. So it is told when the signal comes, before anything unwinds.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


class Stoppable(Protocol):
    """What others may be waiting for."""

    def stop(self) -> None:
        """Lets all who wait go on, with an error."""
        ...


@contextmanager
def stopped_by_interrupts(what: Stoppable) -> Iterator[None]:
    """Stops something at Ctrl-C, for the length of a block, before the handler that there is runs.

    Where nothing handles the signal in Python, or outside the main thread, this does nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        what.stop()
        before(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
