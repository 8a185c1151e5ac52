"""Trying again what may succeed another time, beyond what huggingface_hub tries itself."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Final, TypeVar

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from reap_stream.hub.errors import TRANSPORT_ERROR, cause_of

_T = TypeVar("_T")

# Attempts in a row that bring nothing; one that brings something begins the count anew.
_ATTEMPTS: Final = 4
_PAUSE_SECONDS: Final = 2.0
# What the Hub refuses; a timeout (408) and a rate limit (429) pass.
_REFUSALS: Final = frozenset(range(400, 500)) - {408, 429}
# A wrong length is an OSError without a number.
_NETWORK_ERRNOS: Final = frozenset(
    {None, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.ENETUNREACH}
)


def persist(attempt: Callable[[], _T], progress: Callable[[], int] = lambda: 0) -> _T:
    """Calls `attempt` again while the failure may pass, and after each that brought something."""
    left, before = _ATTEMPTS, progress()
    while True:
        try:
            return attempt()
        except (TRANSPORT_ERROR, OSError) as error:
            now = progress()
            left = _ATTEMPTS if now > before else left - 1
            before = now
            if left == 0 or not _may_pass(error):
                raise
        time.sleep(_PAUSE_SECONDS)


def _may_pass(error: Exception) -> bool:
    """Whether to try again: not where the Hub refuses, and not where the disk does."""
    said = cause_of(error)
    if isinstance(said, HfHubHTTPError):
        return said.response.status_code not in _REFUSALS
    if isinstance(said, OfflineModeIsEnabled):
        return False
    return not isinstance(said, OSError) or said.errno in _NETWORK_ERRNOS
