"""The process of one job: the command line itself, which ends when the batch does.

    python -m reap_stream.batch.child BATCH_PID ARGUMENT...

A batch that is killed outright cannot stop its job any more. The job would go on unseen, and hold its
output when the batch is started again; so the system is asked to interrupt it, as Ctrl-C would.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress

from reap_stream.cli import main

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Has this process interrupted when its parent ends.

    Args:
        parent: process id of the batch.
    """
    # Ignored where the batch runs in the background of a script, and inherited from there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Systems other than Linux have no such call: there the lock of the output tells.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
    if os.getppid() != parent:
        raise KeyboardInterrupt


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
