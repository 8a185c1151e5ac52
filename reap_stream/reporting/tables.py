"""The tables of a report: each layer, each source, the evaluation, and the facts of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from reap_stream.reporting.markup import table
from reap_stream.reporting.text import counted, percent, short_label

if TYPE_CHECKING:
    from reap_stream.reporting.evaluation import Evaluated
    from reap_stream.reporting.figures import Figures
    from reap_stream.reporting.subject import Subject

_GIB = 2**30


def layer_table(figures: Figures) -> str:
    """A row for each layer."""
    head = ["layer", "routed tokens", "unreached", "mean score", "highest"]
    rows = [
        [
            layer,
            f"{int(figures.tokens[:, row].sum()):,}",
            int(figures.unreached[row].sum()),
            f"{figures.scores[row].mean():.4g}",
            f"{figures.scores[row].max():.4g}",
        ]
        for row, layer in enumerate(figures.layers)
    ]
    if figures.kept is not None:
        head += ["lowest kept", "highest removed", "tokens removed", "gate × norm removed"]
        for row, cells in enumerate(rows):
            cells.extend(_cut_cells(figures, row))
    if figures.agreed is not None:
        head.append("halves agree")
        for row, cells in enumerate(rows):
            cells.append(percent(figures.agreed.shares[row]))
    return table(head, rows, "layer-table")


def _cut_cells(figures: Figures, row: int) -> list[str]:
    assert figures.kept is not None
    kept, scores = figures.kept[row], figures.scores[row]
    removed = f"{scores[~kept].max():.4g}" if not kept.all() else "–"
    return [
        f"{scores[kept].min():.4g}",
        removed,
        percent(figures.removed_tokens()[row]),
        percent(figures.removed_saliency()[row]),
    ]


def source_table(figures: Figures) -> str:
    """A row for each calibration source."""
    specialists = figures.specialists()
    head = ["source", "routed tokens", "own experts"]
    rows: list[list[str]] = [
        [
            short_label(label),
            f"{int(figures.tokens[number].sum()):,}",
            f"{int(specialists[number].sum()):,}",
        ]
        for number, label in enumerate(figures.sources)
    ]
    if figures.kept is not None:
        head += ["of these removed", "its tokens removed", "its gate × norm removed"]
        for number, cells in enumerate(rows):
            gone = specialists[number] & ~figures.kept
            cells.append(f"{int(gone.sum()):,}")
            cells += [percent(share) for share in figures.removed_of_source(number)]
    if figures.alone is not None and figures.kept is not None:
        head.append("alone, keeps the same")
        for number, cells in enumerate(rows):
            both = figures.alone[number] & figures.kept
            cells.append(percent(both.sum() / figures.kept.sum()))
    return table(head, rows, "source-table")


def pair_table(figures: Figures) -> str:
    """What the choices by two sources alone have in common, for each pair."""
    assert figures.alone is not None
    rows = []
    for one, other in combinations(range(len(figures.sources)), 2):
        both = figures.alone[one] & figures.alone[other]
        names = [short_label(figures.sources[number], 32) for number in (one, other)]
        rows.append([" and ".join(names), percent(both.sum() / figures.alone[one].sum())])
    return table(["sources", "keep in common"], rows, "pair-table")


def evaluation_table(evaluated: Sequence[Evaluated]) -> str:
    """A row for each candidate."""
    reference = evaluated[0]
    head = ["candidate", "experts", "removed", "loss", "above the reference", "KL", "same top-1"]
    rows = []
    for one in evaluated:
        known = one.loss is not None and reference.loss is not None
        rows.append(
            [
                short_label(one.label, 60),
                one.keep,
                percent(1 - one.keep / reference.keep),
                _shown(one.loss),
                f"{one.loss - reference.loss:+.4f}" if known else "–",  # type: ignore[operator]
                _shown(one.kl),
                "–" if one.top1 is None else percent(one.top1),
            ]
        )
    return table(head, rows, "evaluation-table")


def _shown(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.4f}"


def facts_table(subject: Subject) -> str:
    """What the run was and took."""
    return table([], list(_facts(subject)), "facts-table")


def _facts(subject: Subject) -> Iterator[tuple[str, str]]:
    run, scores, choice = subject.run, subject.scores, subject.chooser.choice
    source, settings = _object(run, "source"), _object(run, "settings")
    yield "model", str(settings.get("model") or source.get("path") or "not recorded")
    if isinstance(source.get("architecture"), str):
        yield "architecture", source["architecture"]
    yield "fingerprint", scores.model_fingerprint
    yield "criterion", choice.method
    if choice.source_weights:
        listed = ", ".join(f"{label} × {weight:g}" for label, weight in choice.source_weights)
        yield "weights of sources", listed
    protected = subject.chooser.protected or {}
    if protected:
        count = sum(len(experts) for experts in protected.values())
        yield "kept whatever their score", counted(count, "expert")
    if subject.chooser.groups > 1:
        yield "router groups", str(subject.chooser.groups)
    yield "calibration", ", ".join(scores.sources)
    yield from _calibration(run, scores.metadata)
    yield from _costs(run)
    versions = _object(run, "versions")
    if versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _calibration(
    run: Mapping[str, Any], metadata: Mapping[str, str]
) -> Iterator[tuple[str, str]]:  # fmt: skip
    calibration = _object(run, "calibration")
    rows = _number(calibration, "rows")
    if rows is not None:
        yield "calibration rows", f"{rows:,.0f}"
    tokens = calibration.get("tokens", metadata.get("tokens"))
    if tokens is not None and str(tokens).isdecimal():
        yield "calibration tokens", f"{int(tokens):,}"


def _costs(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    seconds = _number(run, "seconds")
    if seconds is not None:
        yield "time", duration(seconds)
    for name, key in (
        ("peak memory", "peak_resident_nbytes"),
        ("peak device memory", "peak_device_nbytes"),
    ):
        nbytes = _number(run, key)
        if nbytes:
            yield name, f"{nbytes / _GIB:.2f} GiB"
    budget = _number(_object(run, "memory"), "budget_nbytes")
    if budget is not None:
        yield "memory budget", f"{budget / _GIB:.2f} GiB"
    for name, key in (("read", "read_nbytes"), ("written", "written_nbytes")):
        nbytes = _number(run, key)
        if nbytes is not None:
            yield name, f"{nbytes / 1e9:.2f} GB"
    for name in _object(run, "stages"):
        stage = _number(_object(run, "stages"), name)
        if stage is not None:
            yield f"time {name}", duration(stage)


def duration(seconds: float) -> str:
    """A time for people: ``43.2 s``, ``5 min 2 s``, ``3 h 7 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _object(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _number(values: Mapping[str, Any], key: str) -> float | None:
    found = values.get(key)
    return found if type(found) in (int, float) else None
