"""One command in a process of its own, which does not outlive the batch, and what it said."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

_PATIENCE_SECONDS: Final = 60.0
_TAIL_NBYTES: Final = 10_000
_PROMPT: Final = "$ reap-stream "


def run_line(line: Sequence[str], base: Path, log: Path) -> int:
    """Runs one command to its end.

    Args:
        line: its arguments.
        base: directory that it runs in.
        log: file that gets what it prints, behind what is there.

    Returns:
        Its exit status, negative where a signal ended it.

    Raises:
        KeyboardInterrupt: this process was told to end; so was the command.
    """
    with log.open("ab") as stream:
        stream.write(f"{_PROMPT}{shlex.join(line)}\n".encode())
        stream.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "reap_stream.batch.child", str(os.getpid()), *line],
            cwd=base,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=safe_environment(),
            # Else a Ctrl-C reaches it twice: from the terminal, and from here.
            start_new_session=True,
        )
        try:
            return process.wait()
        except BaseException:
            _end(process)
            raise


def safe_environment() -> dict[str, str]:
    """The environment, in which modules in the working directory are not imported."""
    return {**os.environ, "PYTHONSAFEPATH": "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Lets a command tidy up, and kills it if it does not."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_PATIENCE_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Has what ends a process quietly interrupt it instead, unless it is told to ignore it."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    for number, handler in before.items():
        if handler == signal.SIG_DFL:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def why_failed(code: int, log: Path) -> str:
    """What is to say of a command that failed: its status, and the last line that it said.

    Args:
        code: its exit status, negative where a signal ended it.
        log: what it printed, behind what others did.
    """
    said = _last_words(log)
    if code >= 0:
        return f"exit {code}: {said or 'it said nothing'}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    # The system does so where memory is short; nobody else would tell.
    hint = ": memory may have been short, see the system's log" if -code == signal.SIGKILL else ""
    return f"ended by {name}{hint}{f' (last said: {said})' if said else ''}"


def _last_words(log: Path) -> str:
    """The last line that the last command said, without the program's name."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL_NBYTES))
        lines = stream.read().decode(errors="replace").splitlines()
    begun = max((n for n, line in enumerate(lines) if line.startswith(_PROMPT)), default=-1)
    said = [line.rpartition("\r")[2] for line in lines[begun + 1 :] if line.strip()]
    own = [line for line in said if line.startswith("reap-stream: ")]
    return (own or said or [""])[-1].removeprefix("reap-stream: ")
