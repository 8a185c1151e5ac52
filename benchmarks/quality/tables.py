"""Figures as the page shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def percent(share: float, digits: int = 1) -> str:
    """A share in per cent, without needless zeros: 0.125 → 12.5 %."""
    text = f"{100 * share:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + " %"


def plus_minus(pair: tuple[float, float], digits: int = 3, *, signed: bool = False) -> str:
    """A figure and its spread."""
    sign = "+" if signed else ""
    return f"{pair[0]:{sign}.{digits}f} ± {pair[1]:.{digits}f}"


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
