"""`reap-stream batch`: its arguments. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_batch(parser: argparse.ArgumentParser) -> None:
    """Which jobs, and how they are run."""
    add = parser.add_argument
    add(
        "jobs",
        type=Path,
        metavar="JOBS.toml",
        help="a table [defaults] and a [[job]] for each job; keys are the options of prune, and what "
        "follows it: verify, eval, report, card, upload; paths are relative to the file",
    )
    add("--dry-run", action="store_true", help="check all jobs, list their commands, run none")
    add("--fail-fast", action="store_true", help="stop at the first job that fails")
    add("--json", action="store_true", help="the summary as JSON")
    add(
        "--work",
        type=Path,
        metavar="DIR",
        help="where logs, records and summary.json go (default: NAME.reap-batch beside the file)",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from reap_stream.batch.command import batch

    batch(arguments)
