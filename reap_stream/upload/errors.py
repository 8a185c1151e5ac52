"""What to do about an upload that fails: huggingface_hub's own words, and our hint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from reap_stream.errors import OutputError, ReapStreamError, UsageError
from reap_stream.hub.errors import TRANSPORT_ERROR, without_secrets

Kind: TypeAlias = type[UsageError] | type[OutputError]

_LOGIN: Final = "log in with a token that may write: hf auth login"
_AGAIN: Final = "run the same command again: what is there already is not sent a second time"
_STATUSES: Final = {
    400: "the Hub does not take it as it is",
    401: _LOGIN,
    402: "the account has no room for it: see https://huggingface.co/docs/hub/storage-limits",
    403: "the token may not write there: give it write access to this repository's namespace",
    409: f"somebody else changes the repository at this moment; {_AGAIN}",
    412: f"somebody else changed the repository meanwhile; {_AGAIN}",
    413: "the Hub finds it too long: write it anew with a smaller --max-shard-size",
    429: f"the Hub asks to slow down: wait some minutes, then {_AGAIN}",
}


@contextmanager
def explained(repository: str, doing: str, kind: Kind) -> Iterator[None]:
    """Turn what huggingface_hub raises into an error that says what to do.

    Args:
        repository: its id.
        doing: what is being done, e.g. ``sending``.
        kind: class of the error: `UsageError` before anything is sent, `OutputError` after.

    Raises:
        ReapStreamError: of that class, in place of any error of the network, the Hub or the disk.
    """
    try:
        yield
    except ReapStreamError:
        raise
    except Exception as error:
        said = without_secrets(error)
        raise kind(f"{repository}: {doing} failed: {_hint(error)} ({said})") from error


def status_of(error: BaseException) -> int | None:
    """Status of the answer that an error speaks of."""
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _hint(error: Exception) -> str:
    hints: tuple[tuple[type[Exception], str], ...] = (
        (LocalTokenNotFoundError, _LOGIN),
        (OfflineModeIsEnabled, "offline mode is on: unset HF_HUB_OFFLINE"),
        (HFValidationError, "this is no id on the Hub: give org/name"),
        (RevisionNotFoundError, "no such branch"),
        (
            RepositoryNotFoundError,
            f"no such repository, or the token may not see it: {_LOGIN}",
        ),
        (HfHubHTTPError, ""),
        (TRANSPORT_ERROR, f"no connection to {constants.ENDPOINT}, or it broke: {_AGAIN}"),
    )
    if isinstance(error, ValueError) and "README.md" in str(error):
        return "the Hub does not take the card: `reap-stream card` renders it anew"
    hint = next((text for kind, text in hints if isinstance(error, kind)), "")
    return hint or _STATUSES.get(status_of(error) or 0, _AGAIN)
