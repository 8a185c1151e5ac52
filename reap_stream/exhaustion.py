"""Want of memory, told from other failures; imports no torch."""

from __future__ import annotations

import sys

# What torch's allocator for the CPU says, in a RuntimeError.
_NO_HOST_MEMORY = "can't allocate memory"


def exhausted_memory(error: BaseException) -> str | None:
    """What to tell the user of an error that stands for want of memory; None if it does not."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return (
            "the device is out of memory: give smaller --batch-tokens, or --device cpu "
            f"({_first_line(error)})"
        )
    host = isinstance(error, RuntimeError) and _NO_HOST_MEMORY in str(error)
    if host or isinstance(error, MemoryError):
        return (
            "the machine is out of memory: give --memory less than it has free, or smaller "
            f"--batch-tokens ({_first_line(error) or type(error).__name__})"
        )
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
