"""What to do about a data set that cannot be had: every failure says its remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Final

from reap_stream.calibration.spec import CalibrationSpec
from reap_stream.errors import CalibrationError, ReapStreamError, UsageError

_LISTED: Final = 12
_SEARCHED: Final = 200
# Ids of one owner are alike anyway.
_ALIKE: Final = 0.75


@contextmanager
def explained(name: str, doing: str) -> Iterator[None]:
    """Turn what the Hub's libraries raise into an error that says what to do.

    Args:
        name: id of the data set.
        doing: what is being done, for the message.

    Raises:
        CalibrationError: in place of any error but our own.
    """
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RevisionNotFoundError

    try:
        yield
    except ReapStreamError:
        raise
    except OfflineModeIsEnabled as error:
        raise CalibrationError(
            f"data set {name}: HF_HUB_OFFLINE is set: unset it, or save the data set to a .jsonl"
            " or .parquet file where there is a network and give its path"
        ) from error
    except GatedRepoError as error:
        raise CalibrationError(
            f"data set {name} is gated: accept its conditions on {_page(name)}, then: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise CalibrationError(
            f"data set {name} has no such revision: {_page(name)}/commits/main lists them"
        ) from error
    except Exception as error:
        raise CalibrationError(
            f"data set {name} failed at {doing}: {type(error).__name__}: {error}. Can {_page(name)}"
            " be reached? If it can, save the rows you want to a .jsonl or .parquet file"
        ) from error


def choose(spec: CalibrationSpec, what: str, wanted: str | None, known: Sequence[str]) -> str:
    """Return the configuration or split that a SPEC means.

    Args:
        spec: the SPEC, for the message.
        what: ``configuration`` or ``split``.
        wanted: as the SPEC has it; None: the only one.
        known: those there are.

    Raises:
        UsageError: none is named and there is not exactly one.
        CalibrationError: there is none of that name.
    """
    if wanted in known:
        return str(wanted)
    if wanted is None and len(known) == 1:
        return known[0]
    shown = ", ".join(known[:_LISTED]) or "none"
    there = (
        f"it has {shown} and {len(known) - _LISTED} more" if known[_LISTED:] else f"it has {shown}"
    )
    if wanted is None:
        raise UsageError(
            f"SPEC {spec.text!r} must name a {what} of {spec.name}, in the form"
            f" ID[CONFIG](SPLIT):N: {there}"
        )
    close = get_close_matches(wanted, known, n=1)
    hint = f", did you mean {close[0]}?" if close else ":"
    raise CalibrationError(
        f"SPEC {spec.text!r}: {spec.name} has no {what} {wanted!r}{hint} {there}"
    )


def close_matches(api: Any, name: str) -> str:
    """Return a sentence that names data sets of like id; empty if the Hub names none.

    Args:
        api: `huggingface_hub.HfApi`.
        name: the id that there is not.
    """
    owner, _, own = name.rpartition("/")
    found = [*_listed(api, author=owner), *_listed(api, search=own)] if owner else []
    known = dict.fromkeys([*found, *_listed(api, search=name)])
    close = get_close_matches(name, known, n=3, cutoff=_ALIKE)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _listed(api: Any, **query: str) -> list[str]:
    try:
        return [found.id for found in api.list_datasets(limit=_SEARCHED, **query)]
    except Exception:  # noqa: BLE001 - a suggestion that cannot be had is no second error
        return []


def _page(name: str) -> str:
    from huggingface_hub.constants import ENDPOINT

    return f"{ENDPOINT}/datasets/{name}"
