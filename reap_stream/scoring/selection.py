"""From scores to kept experts: how many stay, which ones, and whether the router can live with it.

Every MoE layer keeps the same number of experts, because serving engines read one number from
config.json. A router with groups (DeepSeek-V3, GLM) views its scores as [groups, experts / groups],
so the same number must stay in each contiguous group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from reap_stream.errors import CalibrationError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# A group's own score is the sum of its two best experts, in transformers and vLLM alike.
MIN_EXPERTS_PER_GROUP = 2

_DECIMAL = re.compile(r"[0-9]{1,9}(?:\.[0-9]{0,18})?|\.[0-9]{1,18}|[0-9]{1,9}/[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Target:
    """One pruned variant.

    Attributes:
        sparsity: the fraction of routed experts asked to go; of a kept count, the fraction it means.
        keep: experts that stay in every MoE layer.
    """

    sparsity: float
    keep: int


def kept_count(num_experts: int, sparsity: float | Fraction | str, groups: int) -> int:
    """Return ``E - floor(E * S)``, rounded up to a multiple of the router's groups.

    The product is exact: a decimal is read as the decimal it was written as, so that 0.3 of 160
    is 48 whatever the nearest binary fraction of 0.3 is.

    Args:
        num_experts: routed experts of a layer (E).
        sparsity: fraction to remove (S), 0 <= S < 1; a float counts as its shortest decimal.
        groups: the router's group count; 1 where it has none.

    Raises:
        UsageError: S is no number of that range, or E does not divide into the groups.
    """
    _check_groups(num_experts, groups)
    fraction = _exact(sparsity)
    keep = num_experts - int(num_experts * fraction)
    return -(-keep // groups) * groups


def parse_targets(
    sparsity: str | None, keep: str | None, num_experts: int, groups: int
) -> list[Target]:
    """Read ``--sparsity S[,S...]`` or ``--keep N[,N...]``, of which exactly one must be given.

    Args:
        sparsity: comma-separated fractions, e.g. ``"0.25,0.4"``.
        keep: comma-separated counts, e.g. ``"120,96"``.
        num_experts: routed experts of a layer.
        groups: the router's group count; 1 where it has none.

    Returns:
        The targets in the order given.

    Raises:
        UsageError: none or both are given, a number is malformed, out of range or no multiple of
            the groups, or two targets keep the same number of experts.
    """
    if (sparsity is None) == (keep is None):
        raise UsageError(
            "give either --sparsity or --keep, such as --sparsity 0.25,0.4 or --keep 96"
        )
    _check_groups(num_experts, groups)
    if sparsity is not None:
        targets = [
            Target(float(_exact(part)), kept_count(num_experts, part, groups))
            for part in _parts(sparsity)
        ]
    else:
        counts = [_parse_keep(part, num_experts, groups) for part in _parts(keep or "")]
        targets = [Target(float(1 - Fraction(n, num_experts)), n) for n in counts]
    seen: set[int] = set()
    for target in targets:
        if target.keep in seen:
            raise UsageError(
                f"two targets keep {target.keep} of {num_experts} experts: leave one of them out"
            )
        seen.add(target.keep)
    return targets


def select(
    scores: NDArray[np.float64], keep: int, groups: int, protected: Sequence[int] = ()
) -> tuple[int, ...]:
    """Choose the experts that stay: the highest scores, and of equal scores the lower index.

    Args:
        scores: float64 [E].
        keep: how many stay; a multiple of `groups`.
        groups: the router's group count; with more than one, ``keep / groups`` stay in each
            contiguous group of ``E / groups``.
        protected: experts that go last, whatever their score.

    Returns:
        The kept experts' indices, ascending.

    Raises:
        CalibrationError: a score is NaN.
        UsageError: `keep` cannot be met.
    """
    _check_groups(scores.shape[0], groups)
    _check_keep(keep, scores.shape[0], groups)
    missing = np.flatnonzero(np.isnan(scores))
    if missing.size:
        raise CalibrationError(
            f"the score of expert {missing[0]} is NaN ({missing.size} such): it cannot be ranked"
        )
    grouped = scores.reshape(groups, -1)
    exposed = np.ones(scores.shape, dtype=bool)
    exposed[list(protected)] = False
    # The sort is stable, so that equal scores stay in index order.
    order = np.lexsort((-grouped, exposed.reshape(groups, -1)), axis=1)
    best = order[:, : keep // groups]
    first_of_group = np.arange(groups)[:, None] * grouped.shape[1]
    return tuple(int(expert) for expert in np.sort((best + first_of_group).ravel()))


def check_routing(keep: int, experts_per_token: int, groups: int, topk_groups: int) -> None:
    """Refuse a kept count with which the router could not choose its experts.

    Args:
        keep: experts that stay in every layer.
        experts_per_token: the router's top-k.
        groups: the router's group count; 1 where it has none.
        topk_groups: groups a token's experts may come from; of no meaning with one group.

    Raises:
        UsageError: fewer experts than top-k are in reach, or a group holds fewer than 2.
    """
    if groups == 1:
        if keep < experts_per_token:
            raise UsageError(
                f"keeping {keep} experts leaves fewer than the {experts_per_token} that the router "
                f"chooses per token: keep at least {experts_per_token}"
            )
        return
    if not 1 <= topk_groups <= groups:
        raise UsageError(
            f"the router takes {topk_groups} of its {groups} groups: that must be 1 to {groups}"
        )
    per_group = max(MIN_EXPERTS_PER_GROUP, -(-experts_per_token // topk_groups))
    if keep // groups < per_group:
        raise UsageError(
            f"keeping {keep} experts leaves {keep // groups} in each of {groups} groups; a token "
            f"chooses {experts_per_token} experts from {topk_groups} groups and a group is ranked "
            f"by its best {MIN_EXPERTS_PER_GROUP}, so each needs {per_group}: "
            f"keep at least {per_group * groups}"
        )


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _exact(sparsity: float | Fraction | str) -> Fraction:
    if isinstance(sparsity, str) and not _DECIMAL.fullmatch(sparsity):
        raise UsageError(
            f"sparsity {sparsity!r} is no number: give a fraction to remove, such as 0.4"
        )
    text = repr(float(sparsity)) if isinstance(sparsity, (float, int)) else sparsity
    try:
        fraction = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"sparsity {sparsity} is no number: give a fraction to remove, such as 0.4"
        ) from error
    if not 0 <= fraction < 1:
        raise UsageError(
            f"sparsity {sparsity} is out of range: at least 0 and below 1, such as 0.4"
        )
    return fraction


def _parse_keep(text: str, num_experts: int, groups: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UsageError(
            f"kept count {text!r} is no whole number: give one such as {num_experts // 2}"
        )
    keep = int(text)
    _check_keep(keep, num_experts, groups)
    return keep


def _check_keep(keep: int, num_experts: int, groups: int) -> None:
    if not 1 <= keep <= num_experts:
        raise UsageError(
            f"cannot keep {keep} of {num_experts} experts: give {groups} to {num_experts}"
        )
    if keep % groups:
        nearest = {keep // groups * groups, -(-keep // groups) * groups} - {0}
        choices = " or ".join(str(count) for count in sorted(nearest))
        raise UsageError(
            f"{keep} experts do not divide into the router's {groups} groups: keep {choices}"
        )


def _check_groups(num_experts: int, groups: int) -> None:
    if groups < 1 or num_experts < 1 or num_experts % groups:
        raise UsageError(
            f"{num_experts} experts do not divide into {groups} router groups: check config.json"
        )
