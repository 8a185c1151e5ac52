"""`reap-stream report`: its arguments. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

# As `METHODS` has them, whose module takes longer to import than help texts may.
_METHODS = ("reap", "ean", "frequency", "gate", "random")


def add_report(parser: argparse.ArgumentParser) -> None:
    """What is reported, and where the page goes."""
    add = parser.add_argument
    add(
        "subject",
        type=Path,
        metavar="DIR-or-SCORES",
        help="a pruned checkpoint, or a file of observe or merge",
    )
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.html",
        help="the page; its pictures are also written beside it, as FILE-*.png",
    )
    add(
        "--eval",
        type=Path,
        metavar="EVAL.json",
        help="what eval --output wrote: adds loss against sparsity, and the error layer by layer",
    )
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument(
        "--sparsity", metavar="S", help="of a SCORES file: fraction of experts to remove"
    )
    targets.add_argument(
        "--keep", metavar="N", help="of a SCORES file: experts to keep in every layer"
    )
    add("--method", choices=_METHODS, help="of a SCORES file: criterion (default: reap)")
    add(
        "--source-weights",
        metavar="SOURCE=W[,…]",
        help="of a SCORES file: how often tokens of a calibration source count",
    )
    add("--overwrite", action="store_true", help="replace an existing report")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from reap_stream.reporting.command import report

    report(arguments)
