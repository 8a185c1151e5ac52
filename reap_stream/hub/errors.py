"""What to do about a model that cannot be had: huggingface_hub's own words, and our hint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from reap_stream.errors import CheckpointError, ReadError, ReapStreamError

_OFFLINE: Final = (
    "it is not in the cache and the Hub was not asked: unset HF_HUB_OFFLINE, or fetch the model"
    " first where there is a network"
)
_NOT_FOUND: Final = "there is no such model; for a private one: hf auth login"
_BROKEN: Final = "the connection did not hold: try again"
_UNREACHED: Final = "the Hub was not reached: see to the network, then try again"
# Of httpx and of httpx2.
_UNREACHED_NAMES: Final = frozenset({"ConnectError", "ConnectTimeout"})
# Addresses that storage is asked by open it to everybody for some time.
_SIGNATURE: Final = re.compile(r"(https?://[^\s?'\"]+\?)[^\s'\")]+")
_TOKEN: Final = re.compile(r"hf_\w{4,}", re.ASCII)
_FORBIDDEN: Final = 403
_TOO_MANY: Final = 429

# The library of the connection is httpx or httpx2, as the version of huggingface_hub has it; this is
# that library's base of all errors.
TRANSPORT_ERROR: Final[type[Exception]] = HfHubHTTPError.__bases__[0]
"""What is raised where a connection breaks, or, as `HfHubHTTPError`, where the Hub refuses."""

Kind: TypeAlias = type[CheckpointError] | type[ReadError]


@contextmanager
def explained(repository: str, doing: str, kind: Kind = CheckpointError) -> Iterator[None]:
    """Turn what huggingface_hub raises into an error that says what to do.

    Args:
        repository: id of the model.
        doing: what is being done, e.g. ``fetching config.json``.
        kind: class of the error: `CheckpointError` before the long part, `ReadError` in it.

    Raises:
        ReapStreamError: of that class, in place of any error of the network, the Hub or the disk.
    """
    try:
        yield
    except ReapStreamError:
        raise
    except Exception as error:
        said = without_secrets(cause_of(error))
        raise kind(f"{repository}: {doing} failed: {_hint(error, repository)} ({said})") from error


def without_secrets(error: BaseException) -> str:
    """What an error says, in one line, without tokens and without what opens signed addresses."""
    return _SIGNATURE.sub(r"\1…", _TOKEN.sub("hf_…", " ".join(str(error).split())))


def cause_of(error: BaseException) -> BaseException:
    """Why a file is not in the cache: what came of asking the Hub for it."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return error.__cause__
    return error


def _hint(raised: Exception, repository: str) -> str:
    """What the user can do; the most special classes first, as they derive from one another."""
    error = cause_of(raised)
    page = f"{constants.ENDPOINT}/{repository}"
    hints: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
        ((OfflineModeIsEnabled, LocalEntryNotFoundError), _OFFLINE),
        ((GatedRepoError,), f"it is gated: accept its conditions on {page}, then: hf auth login"),
        ((RepositoryNotFoundError,), _NOT_FOUND),
        ((RevisionNotFoundError,), f"no such revision: {page}/commits/main lists them"),
        ((RemoteEntryNotFoundError,), f"the repository lacks the file: see {page}/tree/main"),
        ((DisabledRepoError,), f"the Hub has closed access to it: see {page}"),
        ((HFValidationError,), "ids there are not spelt so"),
        ((HfHubHTTPError,), ""),
        ((TRANSPORT_ERROR,), _BROKEN),
    )
    if type(error).__name__ in _UNREACHED_NAMES:
        return _UNREACHED
    hint = next((text for kinds, text in hints if isinstance(error, kinds)), "")
    return hint or _status_hint(error, page)


def _status_hint(error: BaseException, page: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == _TOO_MANY:
        return "the Hub asks to slow down: wait some minutes, or log in with: hf auth login"
    if status == _FORBIDDEN:
        return f"access is refused: check the token's rights (hf auth whoami) and {page}"
    return "try again"
