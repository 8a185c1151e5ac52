"""`reap-stream eval`: its arguments, and where the result goes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reap_stream.calibration.schemas import parse_field_map
from reap_stream.checkpoint.atomic import write_atomically
from reap_stream.checkpoint.files import read_small
from reap_stream.checkpoint.strict_json import MAX_JSON_NBYTES, parse_object
from reap_stream.errors import CheckpointError, UsageError
from reap_stream.evaluating import evaluate as run_evaluation
from reap_stream.scoring.saliency import METHODS
from reap_stream.scoring.scores_file import load_scores
from reap_stream.scoring.weights import parse_source_weights
from reap_stream.settings import Candidate, ChoiceSettings, EvalSettings, parse_nbytes


def evaluate(arguments: argparse.Namespace) -> None:
    """`reap-stream eval`."""
    if arguments.output is not None:
        check_output(arguments.output, overwrite=arguments.overwrite)
    evaluation = run_evaluation(eval_settings(arguments))
    document = json.dumps(evaluation.document(), indent=2, ensure_ascii=False, allow_nan=False)
    if arguments.output is not None:
        raw = (document + "\n").encode()
        write_atomically(arguments.output, [raw], len(raw))
    _say(document if arguments.json else f"{evaluation.table()}\n\n{evaluation.line()}")


def _say(text: str) -> None:
    print(text)  # noqa: T201 - this is the command line


def eval_settings(arguments: argparse.Namespace) -> EvalSettings:
    """The settings of the command.

    Raises:
        UsageError: arguments that do not go together, or malformed ones.
    """
    return EvalSettings(
        models=tuple(arguments.models),
        text=tuple(arguments.text),
        candidates=tuple(_candidates(arguments)),
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        batch_tokens=arguments.batch_tokens,
        seed=arguments.seed,
        device=arguments.device,
        compute_dtype=arguments.compute_dtype,
        memory=None if arguments.memory is None else parse_nbytes(arguments.memory),
        scratch=_scratch(arguments),
        trust_remote_code=arguments.trust_remote_code,
        pack=arguments.pack,
        field_map=parse_field_map(arguments.map),
    )


def _scratch(arguments: argparse.Namespace) -> Path | None:
    if arguments.scratch is not None or arguments.output is None:
        directory: Path | None = arguments.scratch
        return directory
    output: Path = arguments.output
    return output.absolute().parent


def _candidates(arguments: argparse.Namespace) -> Iterator[Candidate]:
    """Every target of every criterion of every file of scores."""
    targets = arguments.sparsity if arguments.keep is None else arguments.keep
    if (targets is None) != (not arguments.scores):
        message = (
            "candidates that were never written need --scores and either --sparsity or --keep: "
            "give both, or neither"
        )
        raise UsageError(message)
    if not arguments.scores:
        _refuse_choices(arguments)
        return
    for scores in arguments.scores:
        for choice in _choices(arguments, scores):
            for target in targets.split(","):
                if arguments.keep is None:
                    yield Candidate(scores, choice=choice, sparsity=target.strip())
                else:
                    yield Candidate(scores, _count(target), choice)


def _refuse_choices(arguments: argparse.Namespace) -> None:
    """Refuses options that would choose experts where nothing is chosen."""
    for option, value, default in (
        ("--method", arguments.method, "reap"),
        ("--source-weights", arguments.source_weights, None),
        ("--protect", arguments.protect, "none"),
    ):
        if value != default:
            message = (
                f"{option} says how experts are chosen from scores, and no scores are given: add "
                "--scores and --sparsity, or leave it out"
            )
            raise UsageError(message)


def _choices(arguments: argparse.Namespace, scores: Path) -> list[ChoiceSettings]:
    text = arguments.source_weights
    weights = () if text is None else parse_source_weights(text, load_scores(scores).sources)
    methods = [method.strip() for method in arguments.method.split(",")]
    for method in methods:
        if method not in METHODS:
            message = f"--method {method}: choose among {', '.join(METHODS)}"
            raise UsageError(message)
    return [
        ChoiceSettings(method, arguments.seed, weights, arguments.protect) for method in methods
    ]


def _count(text: str) -> int:
    if not text.strip().isdecimal():
        message = f"--keep {text!r}: give numbers of experts, such as 96 or 96,120"
        raise UsageError(message)
    return int(text)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuses, before any work, a file that could not be written or must not be replaced.

    Raises:
        UsageError: it is there and `overwrite` is not given, or it is something else than an
            evaluation, or its directory is missing.
    """
    if not path.absolute().parent.is_dir():
        message = f"{path}: there is no directory {path.absolute().parent}"
        raise UsageError(message)
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        message = f"{path}: exists already; --overwrite to replace it"
        raise UsageError(message)
    if not _is_evaluation(path):
        message = f"{path}: is there and holds no evaluation; choose another --output"
        raise UsageError(message)


def _is_evaluation(path: Path) -> bool:
    try:
        document: Any = parse_object(read_small(path, MAX_JSON_NBYTES), path)
    except CheckpointError:
        return False
    candidates = document.get("candidates")
    return "format_version" in document and isinstance(candidates, Sequence)
