"""May this token write there, and is there what one thinks: asked before anything is sent."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily

from reap_stream.checkpoint.index import PICKLED_SUFFIXES
from reap_stream.errors import UsageError
from reap_stream.hub.retrying import persist
from reap_stream.kept_record import KEPT_FILE
from reap_stream.upload.errors import explained
from reap_stream.upload.tokens import writable

_SHARD: Final = re.compile(r"^([\w./-]*-)[0-9]{5}(-of-[0-9]{5}\.safetensors)$", re.ASCII)
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


@dataclass(frozen=True, slots=True)
class Standing:
    """What is there already.

    Attributes:
        note: what to know of it; None: nothing.
        start: commit at which a branch that is still to be made begins; None: none is to be made, or
            in a repository that is to be made as well.
        replaced: weights under names that are sent, and their SHA-256, where no record says that they
            are of a pruned checkpoint.
    """

    note: str | None = None
    start: str | None = None
    replaced: Mapping[str, str | None] = field(default_factory=dict)


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
        UsageError: there is no token, it only reads, or it may not write in the namespace.
    """
    with explained(target.repository, "asking who you are", UsageError):
        found: dict[str, Any] = persist(api.whoami)
    user = str(found.get("name"))
    token = (found.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UsageError(
            f"{target.repository}: the token of {user} only reads: log in with one that may write:"
            " hf auth login"
        )
    roles = {str(org.get("name")): org.get("roleInOrg") for org in found.get("orgs") or ()}
    namespace = target.repository.partition("/")[0]
    if roles.get(namespace) == "read":
        raise UsageError(f"{target.repository}: {user} may only read in {namespace}")
    # A token for chosen repositories says itself what it may do, and need not name organisations.
    chosen = writable(token)
    writers = [user, *(name for name, role in roles.items() if role != "read")]
    allowed = writers if chosen is None else sorted(chosen)
    if not {namespace, target.repository} & set(allowed):
        known = ", ".join(allowed) or "no repository"
        raise UsageError(
            f"{target.repository}: the token is of {user} and may write to {known}: give one of"
            " these as namespace, or log in with another token: hf auth login"
        )
    return user


def check_repository(api: HfApi, target: Target, names: Collection[str]) -> Standing:
    """Refuse a repository that is there and would not become what was asked for.

    Args:
        api: the Hub.
        target: the repository.
        names: files to send.

    Raises:
        UsageError: it is public and should not be, or holds other weights.
    """
    try:
        with explained(target.repository, "looking it up", UsageError):
            info = _listed(api, target, target.revision)
    except UsageError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return Standing()
        if isinstance(error.__cause__, RevisionNotFoundError):
            return _without_branch(api, target, names)
        raise
    return _standing(target, info, names)


def check_replaced(target: Target, standing: Standing, hashes: Mapping[str, str]) -> None:
    """Refuse to put a checkpoint in the place of a model that is no pruned one: its source, say.

    Args:
        target: the repository.
        standing: what is there.
        hashes: SHA-256 of what is sent, by name; an upload that was cut has left some of it there.

    Raises:
        UsageError: weights of the same names and other bytes are there.
    """
    others = [name for name, sha256 in standing.replaced.items() if sha256 != hashes[name]]
    if others:
        raise UsageError(
            f"{target.repository}: holds another model, whose {others[0]} would be replaced: give"
            f" another repository or --revision; if it should go, delete it:"
            f" {deletion(target, others)}"
        )


def _listed(api: HfApi, target: Target, revision: str | None) -> ModelInfo:
    return persist(
        lambda: api.model_info(target.repository, revision=revision, files_metadata=True)
    )


def _standing(
    target: Target, info: ModelInfo, names: Collection[str], start: str | None = None
) -> Standing:
    private, siblings = bool(info.private), info.siblings or []
    listed = [sibling.rfilename for sibling in siblings]
    _check_visibility(target, private=private)
    _check_weights(target, names, listed)
    replaced = {
        sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else None
        for sibling in siblings
        if sibling.rfilename in names and PurePosixPath(sibling.rfilename).suffix in _WEIGHTS
    }
    note = _visibility_note(target, private=private)
    return Standing(note, start, {} if KEPT_FILE in listed else replaced)


def other_weights(names: Collection[str], listed: Iterable[str]) -> list[str]:
    """Weights among listed files that are not among those to send: an engine may load them."""
    others = (name for name in listed if name not in names)
    return [name for name in others if PurePosixPath(name).suffix in _WEIGHTS]


def deletion(target: Target, names: Collection[str]) -> str:
    """The command that deletes files of a repository; shards of one set by a pattern.

    Args:
        target: the repository.
        names: the files; of a set of shards all, since those that are sent have another name or
            number.
    """
    patterns = dict.fromkeys(_SHARD.sub(r"\1*\2", name) for name in names)
    revision = [] if target.revision is None else ["--revision", target.revision]
    return shlex.join(["hf", "repos", "delete-files", target.repository, *patterns, *revision])


def _check_weights(target: Target, names: Collection[str], listed: Iterable[str]) -> None:
    weights = other_weights(names, listed)
    if weights:
        raise UsageError(
            f"{target.repository}: holds {len(weights)} files of weights that are not of this"
            f" checkpoint, perhaps of an earlier upload in other shards: delete them:"
            f" {deletion(target, weights)}; or give another repository or --revision"
        )


def _without_branch(api: HfApi, target: Target, names: Collection[str]) -> Standing:
    """A new branch is as visible as its repository, and begins as it did: with no weights.

    The Hub begins a branch at main's last commit, with all that main holds, unless told otherwise.
    """
    if str(target.revision).startswith("refs/"):
        raise UsageError(
            f"{target.repository}: there is no {target.revision}: open the pull request first, or"
            " give a branch, which is made if it is not there"
        )
    with explained(target.repository, "looking it up", UsageError):
        start = persist(lambda: api.list_repo_commits(target.repository))[-1].commit_id
        info = _listed(api, target, start)
    return _standing(target, info, names, start)


def _check_visibility(target: Target, *, private: bool) -> None:
    if not private and not target.public:
        raise UsageError(
            f"{target.repository}: is there and public: say --public, or give another repository"
        )


def _visibility_note(target: Target, *, private: bool) -> str | None:
    if private and target.public:
        return f"{target.repository} is private and stays so: make it public in its settings"
    return None
