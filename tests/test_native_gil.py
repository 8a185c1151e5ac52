"""The extension lets other Python threads run while it works: shown by order, not by time."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

from reap_stream import _native


def overlaps(call, attempts=200):
    """Whether another Python thread ever runs between the start and the end of `call`.

    With a switch interval of many seconds, the main thread gets the GIL back only when the other
    one gives it up: inside `call`, or not before its end. So a call that holds the GIL cannot
    overlap however long it takes, and one that releases it does so sooner or later.
    """
    old_interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        return any(overlaps_once(call) for _ in range(attempts))
    finally:
        sys.setswitchinterval(old_interval)


def overlaps_once(call):
    events = []
    started = threading.Event()

    def work():
        started.set()
        events.append("start")
        call()
        events.append("end")

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    events.append("main")
    thread.join()
    return events.index("main") < events.index("end") and events[0] == "start"


def slow_calls(directory):
    n = 1024
    codes, words = np.zeros((n, n), np.uint8), np.zeros((n, n), np.uint16)
    values, ones = np.zeros((n, n), np.float32), np.ones((n, 1), np.float32)
    sums = [np.zeros(1, np.int64), *(np.zeros(1) for _ in range(5))]
    path, other = directory / "file", directory / "other"
    path.write_bytes(bytes(values.nbytes))
    other.write_bytes(b"")
    plain = {"threads": 1, "isa": "scalar"}
    whole = (0, 0, values.nbytes)
    gates, zeros = ones[:, 0], np.zeros(n, np.int32)
    return {
        "fp8_decode": lambda: _native.fp8_decode(codes, ones, values, n, n, 1, n, "f32", **plain),
        "fp8_encode": lambda: _native.fp8_encode(values, "f32", ones, codes, n, n, 1, n, **plain),
        "block_absmax": lambda: _native.block_absmax(words, "bf16", ones, n, n, 1, n, **plain),
        "packed_decode": lambda: _native.packed_decode(
            codes, "u8", ones, "f32", None, None, values, n, n, n, n, "f32", **plain
        ),
        "rearranged_decode": lambda: _native.rearranged_decode(
            codes, "int8", 8, ones, "f32", None, 0, None, values, n, n, n, "f32", **plain
        ),
        "saliency": lambda: _native.saliency(values, "f32", gates, zeros, *sums, n, **plain),
        "combine": lambda: _native.combine(
            words, "bf16", gates, zeros.astype(np.int64), values, n, **plain
        ),
        "read_ranges": lambda: _native.read_ranges([path], [whole], [values]),
        "write_ranges": lambda: _native.write_ranges([other], [whole], [values]),
        "copy_ranges": lambda: _native.copy_ranges([path], [other], [(0, 0, 0, *whole[1:])]),
        "sync_file": lambda: _native.sync_file(path),
        "control": lambda: sum(range(300_000)),  # long, and holds the GIL throughout
    }


@pytest.mark.parametrize(
    "name",
    [
        "fp8_decode",
        "fp8_encode",
        "block_absmax",
        "packed_decode",
        "rearranged_decode",
        "saliency",
        "combine",
        "read_ranges",
        "write_ranges",
        "copy_ranges",
        "sync_file",
    ],
)
def test_other_threads_run_meanwhile(tmp_path, name):
    assert overlaps(slow_calls(tmp_path)[name])


def test_the_method_would_notice_a_call_that_holds_the_gil(tmp_path):
    assert not overlaps(slow_calls(tmp_path)["control"], attempts=20)


def test_a_read_waits_for_a_pipe_without_the_gil(tmp_path):
    """To open a named pipe waits for its other end, which the same process opens meanwhile."""
    program = """
import os, sys, threading
from reap_stream import _native
os.mkfifo(sys.argv[1])
errors = []
def read():
    try:
        _native.read_ranges([sys.argv[1]], [(0, 0, 1)], [bytearray(1)])
    except OSError as error:
        errors.append(error)
thread = threading.Thread(target=read)
thread.start()
os.close(os.open(sys.argv[1], os.O_WRONLY))
thread.join()
assert errors[0].filename == sys.argv[1], errors
"""
    command = [sys.executable, "-c", program, str(tmp_path / "pipe")]
    subprocess.run(command, check=True, timeout=60)
