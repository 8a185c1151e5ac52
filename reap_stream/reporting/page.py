"""The page: sections in the order in which one asks, in one file that loads nothing.

A content security policy in the page's head says so to the browser: no script, no address.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import PurePath
from typing import Final

from reap_stream.reporting.evaluation import Evaluated
from reap_stream.reporting.figures import Figures
from reap_stream.reporting.layer_curves import layer_curves
from reap_stream.reporting.markup import (
    figure,
    folded,
    key_figures,
    listed,
    ranges,
    section,
    table,
    what,
)
from reap_stream.reporting.subject import Subject
from reap_stream.reporting.tables import (
    duration,
    evaluation_table,
    facts_table,
    layer_table,
    pair_table,
    source_table,
)
from reap_stream.reporting.text import counted, escaped, percent

GENERATOR: Final = '<meta name="generator" content="reap-stream report">'
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_RED: Final = "Red: no calibration token was routed there."
_KEPT: Final = "Experts that stay are in colour, those that go in grey of the same lightness."


@dataclass(frozen=True, slots=True)
class Content:
    """What a page is made of.

    Attributes:
        subject: the scores and what belongs to them.
        figures: the figures of the scores.
        evaluated: candidates of an evaluation, the reference first; empty without one.
        drawings: name of a picture → its HTML.
    """

    subject: Subject
    figures: Figures
    evaluated: Sequence[Evaluated]
    drawings: Mapping[str, str]


def render_page(content: Content) -> str:
    """The whole page."""
    title = model_name(content.subject)
    style = files("reap_stream.reporting").joinpath("page.css").read_text(encoding="utf-8")
    parts = [
        f"<header><h1>{escaped(title)}</h1>\n{what(_headline(content))}</header>",
        key_figures(_key_figures(content)),
        *_notes(content),
        _scores(content),
        _curves(content),
        *_removed(content),
        _agreement(content),
        _tokens(content),
        _sources(content),
        *_evaluation(content),
        section(
            "layers", "Layer by layer", folded("Table of all layers", layer_table(content.figures))
        ),
        section("run", "The run", facts_table(content.subject)),
        f"<footer>reap-stream {escaped(version('reap-stream'))}</footer>",
    ]
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        GENERATOR,
        f"<title>{escaped(title)} – reap-stream</title>",
        f"<style>\n{style}</style>",
    ]
    lines = ['<!DOCTYPE html>\n<html lang="en">\n<head>', *head, "</head>\n<body>", *parts]
    return "\n".join([*lines, "</body>\n</html>\n"])


def model_name(subject: Subject) -> str:
    """What the subject is called: its model, or the file of scores."""
    for part, key in (("settings", "model"), ("source", "path")):
        found = subject.run.get(part)
        name = found.get(key) if isinstance(found, dict) else None
        if isinstance(name, str) and PurePath(name).name:
            return PurePath(name).name
    return subject.path.name


def _headline(content: Content) -> str:
    figures, method = content.figures, content.subject.chooser.choice.method
    layers = counted(len(figures.layers), "layer")
    if figures.keep is None:
        return f"{figures.num_experts} experts in each of {layers}, scored by {method}. No target."
    return (
        f"{figures.keep} of {figures.num_experts} experts stay in each of {layers}, chosen by"
        f" {method}."
    )


def _key_figures(content: Content) -> Iterator[tuple[str, str]]:
    figures, run = content.figures, content.subject.run
    if figures.kept is not None:
        yield "experts removed", percent(1 - figures.kept.mean())
        yield "routed tokens removed", percent(figures.removed_tokens().mean())
        yield "gate × norm removed", percent(figures.removed_saliency().mean())
    if figures.agreed is not None:
        yield "halves agree", percent(figures.agreed.shares.mean())
    yield "unreached experts", f"{int(figures.unreached.sum()):,}"
    yield "routed tokens", f"{int(figures.tokens.sum()):,}"
    if type(run.get("seconds")) in (int, float):
        yield "time", duration(run["seconds"])
    if type(run.get("peak_resident_nbytes")) in (int, float):
        yield "peak memory", f"{run['peak_resident_nbytes'] / 2**30:.2f} GiB"


def _notes(content: Content) -> Iterator[str]:
    notes = list(content.subject.notes)
    for key in ("calibration", "mtp"):
        part = content.subject.run.get(key)
        found = part.get("notes") if isinstance(part, dict) else None
        notes += [note for note in found or () if isinstance(note, str)]
    if notes:
        yield section("notes", "Notes", listed(notes))


def _scores(content: Content) -> str:
    marked = f"{_KEPT} " if content.figures.kept is not None else ""
    text = (
        f"Each cell is an expert, each row a layer. {marked}{_RED} Scores are compared within their"
        " layer alone, so each is divided by the layer's mean."
    )
    return section("scores", "Scores", figure(content.drawings["scores"], text))


def _curves(content: Content) -> str:
    text = (
        "Each line is a layer, from dark (first) to bright (last). Where a curve is flat at the cut,"
        " experts on both sides of it are alike, and which of them go is nearly chance."
    )
    small = what(
        "Each layer by itself, its experts in falling order of score."
        + ("" if content.figures.kept is None else " Right: gate weight × norm that goes.")
    )
    curves = folded("Every layer", small + layer_curves(content.figures))
    return section("curves", "Saliency curves", figure(content.drawings["curves"], text), curves)


def _removed(content: Content) -> Iterator[str]:
    if "removed" in content.drawings:
        text = (
            "Share of the routed tokens, and of the sum of gate weight × output norm, that the"
            " removed experts had on the calibration data."
        )
        picture = figure(content.drawings["removed"], text)
        yield section("removed", "What goes with the experts", picture)


def _agreement(content: Content) -> str:
    agreed, title = content.figures.agreed, "Do two halves of the rows agree?"
    if agreed is None:
        return section("agreement", title, what(f"Not known: {content.figures.why_not}."))
    text = (
        f"Chosen from either half of the calibration rows, {percent(agreed.shares.mean())} of the"
        f" kept experts are the same; {percent(agreed.chance)} would be by chance. A low share says"
        " that which rows were taken decides as much as what the experts do."
    )
    return section("agreement", title, figure(content.drawings["agreement"], text))


def _tokens(content: Content) -> str:
    figures = content.figures
    text = f"Routed tokens of each expert ÷ the mean of its layer. {_RED}"
    rows = [
        [layer, int(lost.sum()), ranges([int(expert) for expert in lost.nonzero()[0]])]
        for layer, lost in zip(figures.layers, figures.unreached, strict=True)
        if lost.any()
    ]
    parts = [what("Every expert was reached by the calibration data.")]
    if rows:
        count = int(figures.unreached.sum())
        said = (
            f"{counted(count, 'expert')} in {counted(len(rows), 'layer')}: no token reached them."
        )
        listing = table(["layer", "count", "experts"], rows, "unreached-table")
        parts = [what(said), folded("Which experts", listing)]
    return section("tokens", "Routed tokens", figure(content.drawings["tokens"], text), *parts)


def _sources(content: Content) -> str:
    figures, title = content.figures, "Which experts serve which source"
    if "sources" not in content.drawings:
        text = "There is one calibration source: give several to see which experts serve which."
        return section("sources", title, what(text), source_table(figures))
    text = (
        "The colour is that of the source that uses the expert most, by shares of its own tokens;"
        f" grey where all use it alike. {_RED} An expert counts as a source's own where its share is"
        " halfway from alike to alone, or above."
    )
    parts = [figure(content.drawings["sources"], text), source_table(figures)]
    if figures.alone is not None:
        said = "Experts that two sources would both keep, if each were the only one:"
        parts += [what(said), pair_table(figures)]
    return section("sources", title, *parts)


def _evaluation(content: Content) -> Iterator[str]:
    if not content.evaluated:
        return
    tokens = content.evaluated[0].tokens
    parts = [
        figure(content.drawings[name], caption)
        for name, caption in (
            ("loss", f"Loss on {tokens:,} predicted tokens of held-out text."),
            ("errors", "‖h − h_ref‖ ÷ ‖h_ref‖ of the hidden states after each layer."),
        )
        if name in content.drawings
    ]
    yield section(
        "evaluation", "Loss against sparsity", *parts, evaluation_table(content.evaluated)
    )
