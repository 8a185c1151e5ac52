"""What must be the same on all ranks, or their sums would be of different things."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from reap_stream.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reap_stream.ranks.base import Ranks


def check_same(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Refuses ranks that are about to do different jobs: other files on another machine, say.

    Args:
        ranks: the ranks.
        facts: what must be the same, as JSON values.

    Raises:
        UsageError: something is not; all ranks raise the same error.
    """
    everyone = ranks.share(dict(facts))
    for rank, theirs in enumerate(everyone):
        for name in sorted(everyone[0].keys() | theirs.keys()):
            mine, other = everyone[0].get(name), theirs.get(name)
            if mine != other:
                message = (
                    f"{name} is {_shown(other)} on rank {rank} and {_shown(mine)} on rank 0: all "
                    "ranks need the same command, files and versions"
                )
                raise UsageError(message)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
