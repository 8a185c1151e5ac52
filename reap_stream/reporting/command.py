"""`reap-stream report`: reads, draws, and writes the page and its pictures."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reap_stream.checkpoint.atomic import write_atomically
from reap_stream.checkpoint.files import open_regular, pread_exact
from reap_stream.errors import CheckpointError, UsageError
from reap_stream.reporting.evaluation import Evaluated, read_evaluation
from reap_stream.reporting.figures import Figures, figures_of
from reap_stream.reporting.page import GENERATOR, Content, render_page
from reap_stream.reporting.subject import Subject, read_checkpoint, read_scores
from reap_stream.scoring.scores_file import load_scores
from reap_stream.scoring.weights import parse_source_weights
from reap_stream.settings import ChoiceSettings

if TYPE_CHECKING:
    from reap_stream.reporting.canvas import Picture

_OF_SCORES = ("sparsity", "keep", "method", "source_weights")
_MARKED_NBYTES = 4096
EVALUATION_FILE = "reap/eval.json"


def report(arguments: argparse.Namespace) -> None:
    """`reap-stream report`.

    Raises:
        UsageError: an output that is there, options that do not fit the subject, or no matplotlib.
        CheckpointError: a damaged record or evaluation.
        CalibrationError: damaged scores.
    """
    require_matplotlib()
    check_output(arguments.output, overwrite=arguments.overwrite)
    subject = read_subject(arguments)
    evaluation = arguments.eval or _own_evaluation(arguments.subject)
    evaluated = () if evaluation is None else read_evaluation(evaluation)
    written = write_report(subject, evaluated, arguments.output, overwrite=arguments.overwrite)
    pictures = len(written) - 1
    print(f"{arguments.output}: {written[0].stat().st_size:,} bytes, {pictures} pictures beside it")  # noqa: T201 - this is the command line


def _own_evaluation(subject: Path) -> Path | None:
    """The evaluation that `reap-stream card --eval` put beside a checkpoint's other records."""
    path = subject / EVALUATION_FILE
    return path if path.is_file() else None


def require_matplotlib() -> None:
    """Refuses to begin where nothing can draw.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        message = 'a report\'s pictures need matplotlib: pip install "reap-stream[report]"'
        raise UsageError(message) from error


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuses, before any work, what must not be replaced.

    Raises:
        UsageError: it is there and `overwrite` is not given, or it is no report.
    """
    if not path.absolute().parent.is_dir():
        message = f"{path}: there is no directory {path.absolute().parent}"
        raise UsageError(message)
    if path.suffix.lower() not in (".html", ".htm"):
        message = f"{path}: a page is written; give --output a name that ends in .html"
        raise UsageError(message)
    _check_replaceable(path, GENERATOR.encode(), overwrite=overwrite)


def _check_replaceable(path: Path, mark: bytes, *, overwrite: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        message = f"{path}: exists already; --overwrite to replace it"
        raise UsageError(message)
    if mark not in _beginning(path):
        message = f"{path}: is there and is no part of a report; choose another --output"
        raise UsageError(message)


def _beginning(path: Path) -> bytes:
    try:
        with open_regular(path) as (fd, nbytes):
            return pread_exact(fd, min(nbytes, _MARKED_NBYTES), 0, path)
    except CheckpointError:
        return b""


def read_subject(arguments: argparse.Namespace) -> Subject:
    """The subject that a command names.

    Raises:
        UsageError: options that do not fit it.
    """
    given = [name for name in _OF_SCORES if getattr(arguments, name) is not None]
    if arguments.subject.is_dir() or not arguments.subject.exists():
        if given:
            option = given[0].replace("_", "-")
            message = (
                f"{arguments.subject}: --{option} is of a file of scores; a pruned checkpoint has"
                " its own record of how it was chosen"
            )
            raise UsageError(message)
        return read_checkpoint(arguments.subject)
    text = arguments.source_weights
    weights = (
        () if text is None else parse_source_weights(text, load_scores(arguments.subject).sources)
    )
    choice = ChoiceSettings(arguments.method or "reap", 0, weights)
    return read_scores(arguments.subject, choice, arguments.sparsity, arguments.keep)


def write_report(
    subject: Subject, evaluated: Sequence[Evaluated], output: Path, *, overwrite: bool = False
) -> list[Path]:
    """Draws and writes a report.

    Args:
        subject: the scores and what belongs to them.
        evaluated: candidates of an evaluation, the reference first; empty without one.
        output: the page.
        overwrite: replace pictures of an earlier report.

    Returns:
        What was written, the page first.

    Raises:
        UsageError: an evaluation of a model with another number of experts, or something else in a
            picture's place.
        OutputError: a file could not be written.
    """
    from reap_stream.reporting.canvas import SOFTWARE, render

    if evaluated and evaluated[0].keep != subject.scores.num_experts:
        message = (
            f"the evaluation's reference, {evaluated[0].label!r}, has {evaluated[0].keep} experts in"
            f" a layer, the scores are of {subject.scores.num_experts}: it is of another model"
        )
        raise UsageError(message)
    figures = figures_of(subject)
    drawn = {
        output.with_name(f"{output.stem}-{picture.name}.png"): picture
        for picture in pictures(figures, subject.chooser.choice.method, evaluated)
    }
    for path in drawn:
        _check_replaceable(path, SOFTWARE.encode(), overwrite=overwrite)
    drawings = {}
    for path, picture in drawn.items():
        rendered = render(picture)
        drawings[picture.name] = rendered.html
        write_atomically(path, [rendered.png], len(rendered.png))
    page = render_page(Content(subject, figures, evaluated, drawings)).encode()
    write_atomically(output, [page], len(page))
    return [output, *drawn]


def pictures(
    figures: Figures, method: str, evaluated: Sequence[Evaluated]
) -> Iterator[Picture]:  # fmt: skip
    """All pictures for which there are figures."""
    from reap_stream.reporting import curves, maps

    yield maps.score_map(figures, method)
    yield curves.curve_picture(figures, method)
    if figures.kept is not None:
        yield curves.removed_picture(figures)
    if figures.agreed is not None:
        yield curves.agreement_picture(figures)
    yield maps.load_map(figures)
    if len(figures.sources) > 1:
        yield maps.source_map(figures)
    if evaluated:
        if curves.loss_lines(evaluated):
            yield curves.loss_picture(evaluated)
        if any(one.errors for one in evaluated[1:]):
            yield curves.error_picture(evaluated)
