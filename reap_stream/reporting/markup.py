"""Small pieces of HTML: tables, figures, key figures. Every text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from reap_stream.reporting.text import escaped


def table(head: Sequence[str], rows: Iterable[Sequence[object]], name: str) -> str:
    """A table that scrolls by itself where the screen is narrow, with the keyboard too.

    Args:
        head: titles of columns; none for a table of facts, two columns wide.
        rows: cells as text.
        name: its id.
    """
    title = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in head)
    thead = f"<thead><tr>{title}</tr></thead>" if head else ""
    body = "\n".join(_row(row, facts=not head) for row in rows)
    kind = "" if head else ' class="facts"'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_label(name)}">'
        f'<table id="{name}"{kind}>{thead}<tbody>\n{body}\n</tbody></table></div>'
    )


def _label(name: str) -> str:
    return f"table: {name.removesuffix('-table')}"


def _row(cells: Sequence[object], *, facts: bool) -> str:
    first, *rest = cells
    tag = "th" if facts else "td"
    scope = ' scope="row"' if facts else ' class="long"' if _is_long(first) else ""
    others = "".join(f"<td>{escaped(cell)}</td>" for cell in rest)
    return f"<tr><{tag}{scope}>{escaped(first)}</{tag}>{others}</tr>"


def _is_long(cell: object) -> bool:
    return len(str(cell)) > 20


def key_figures(pairs: Iterable[tuple[str, str]]) -> str:
    """The few figures that stand first."""
    boxes = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in pairs
    )
    return f'<dl class="key">{boxes}</dl>'


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page; `parts` are HTML already."""
    body = "\n".join(part for part in parts if part)
    return f'<section id="{name}">\n<h2>{escaped(title)}</h2>\n{body}\n</section>'


def what(text: str) -> str:
    """A sentence that says what is seen."""
    return f'<p class="what">{escaped(text)}</p>'


def figure(drawing: str, caption: str = "") -> str:
    """A picture; `drawing` is HTML already."""
    below = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
    return f"<figure>\n{drawing}\n{below}</figure>"


def folded(title: str, body: str) -> str:
    """Something long behind a line; `body` is HTML already."""
    return f"<details><summary>{escaped(title)}</summary>\n{body}\n</details>"


def listed(items: Iterable[object]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{escaped(item)}</li>" for item in items) + "</ul>"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, neighbours as one: ``3, 5–9``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs)
