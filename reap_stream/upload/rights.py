"""May this token write there, and is there what one thinks: asked before anything is sent."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily

from reap_stream.checkpoint.index import PICKLED_SUFFIXES
from reap_stream.errors import UsageError
from reap_stream.upload.errors import explained

_WEIGHTS: Final = frozenset({*PICKLED_SUFFIXES, ".safetensors", ".gguf"})


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint goes.

    Attributes:
        repository: id on the Hub.
        revision: its branch; None: main.
        public: everyone may see a repository that is made for it.
    """

    repository: str
    revision: str | None = None
    public: bool = False


def check_name(repository: str) -> None:
    """Refuse what is no id with a namespace.

    Raises:
        UsageError: it is none.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"{repository}: no id on the Hub: {error}") from error
    if "/" not in repository:
        raise UsageError(f"{repository}: say whose repository it is: NAMESPACE/{repository}")


def check_rights(api: HfApi, target: Target) -> str:
    """Refuse a token that cannot write where it should.

    Returns:
        Who the token belongs to.

    Raises:
        UsageError: there is no token, it only reads, or the namespace is not its owner's.
    """
    with explained(target.repository, "asking who you are", UsageError):
        found: dict[str, Any] = api.whoami()
    user = str(found.get("name"))
    token = (found.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UsageError(
            f"{target.repository}: the token of {user} only reads: log in with one that may write:"
            " hf auth login"
        )
    roles = {org.get("name"): org.get("roleInOrg") for org in found.get("orgs") or ()}
    namespace = target.repository.partition("/")[0]
    if namespace != user and namespace not in roles:
        known = ", ".join(map(str, (user, *roles)))
        raise UsageError(
            f"{target.repository}: the token is of {user} and may write to {known}: give one of"
            " these as namespace, or log in as somebody else: hf auth login"
        )
    if roles.get(namespace) == "read":
        raise UsageError(f"{target.repository}: {user} may only read in {namespace}")
    return user


def check_repository(api: HfApi, target: Target, names: Collection[str]) -> str | None:
    """Refuse a repository that is there and would not become what was asked for.

    Args:
        api: the Hub.
        target: the repository.
        names: files to send.

    Returns:
        What to know of it, or None.

    Raises:
        UsageError: it is public and should not be, or holds other weights.
    """
    try:
        with explained(target.repository, "looking it up", UsageError):
            info = api.model_info(target.repository, revision=target.revision)
    except UsageError as error:
        if isinstance(error.__cause__, (RepositoryNotFoundError, RevisionNotFoundError)):
            return _without_branch(api, target, error.__cause__)
        raise
    _check_visibility(target, private=bool(info.private))
    others = [s.rfilename for s in info.siblings or () if s.rfilename not in names]
    weights = [name for name in others if PurePosixPath(name).suffix in _WEIGHTS]
    if weights:
        raise UsageError(
            f"{target.repository}: holds weights that are not of this checkpoint"
            f" ({', '.join(weights[:5])}): delete them there, or give another repository or --revision"
        )
    return _visibility_note(target, private=bool(info.private))


def _without_branch(api: HfApi, target: Target, error: Exception) -> str | None:
    """A new branch is as visible as its repository."""
    if isinstance(error, RepositoryNotFoundError):
        return None
    with explained(target.repository, "looking it up", UsageError):
        info = api.model_info(target.repository)
    _check_visibility(target, private=bool(info.private))
    return _visibility_note(target, private=bool(info.private))


def _check_visibility(target: Target, *, private: bool) -> None:
    if not private and not target.public:
        raise UsageError(
            f"{target.repository}: is there and public: say --public, or give another repository"
        )


def _visibility_note(target: Target, *, private: bool) -> str | None:
    if private and target.public:
        return f"{target.repository} is private and stays so: make it public in its settings"
    return None
