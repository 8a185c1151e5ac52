"""What a fine-grained token may write to, as `whoami` describes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_WRITING: Final = frozenset({"repo.write", "repo.content.write"})


def writable(token: Mapping[str, Any]) -> set[str] | None:
    """Names of users, organisations and models that a fine-grained token may write to.

    Args:
        token: ``auth.accessToken`` of `whoami`.

    Returns:
        The names; None where the token is of another kind, or is described in a way that leaves it
        open, so that only trying can tell.
    """
    described = token.get("fineGrained")
    if token.get("role") != "fineGrained" or not isinstance(described, dict):
        return None
    if _writes(described.get("global")):
        return None
    found = set()
    for scope in described.get("scoped") or ():
        if _writes(scope.get("permissions")):
            name = (scope.get("entity") or {}).get("name")
            if not isinstance(name, str):
                return None
            found.add(name)
    return found


def _writes(permissions: object) -> bool:
    return isinstance(permissions, list) and not _WRITING.isdisjoint(map(str, permissions))
