"""The command line: arguments become settings, settings become one call. No torch at import."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reap_stream import __version__
from reap_stream.batch.arguments import add_batch
from reap_stream.errors import InterruptedRunError, ReapStreamError, is_told
from reap_stream.exhaustion import exhausted_memory
from reap_stream.options import (
    MODEL_HELP,
    add_again,
    add_calibration,
    add_card,
    add_choice,
    add_evaluation,
    add_evict,
    add_forward,
    add_layout,
    add_map,
    add_method,
    add_output,
    add_packing,
    add_ranks,
    add_run_options,
    add_targets,
    add_upload,
    add_writing,
)
from reap_stream.ranks.launch import (
    DEFAULT_PATIENCE,
    check_command,
    launched_place,
    open_ranks,
    speaking_once,
)
from reap_stream.reporting.arguments import add_report

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - argparse has no public name for it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        0 done, 1 the job failed, 2 refused before work began, 130 interrupted.
    """
    with speaking_once():
        arguments = build_parser().parse_args(argv)
    _let_threads_sleep()
    try:
        arguments.run(arguments)
    except ReapStreamError as error:
        # What could not be read may be there the next time; other errors say what to do themselves.
        hint = _resume_hint(arguments) if error.resumable else ""
        _complain(error, f"reap-stream: {error}{hint and '.'}{hint}")
        return error.exit_code
    except KeyboardInterrupt as error:
        _complain(error, f"\nreap-stream: {str(error) or 'interrupted'}.{_resume_hint(arguments)}")
        return InterruptedRunError.exit_code
    except (MemoryError, RuntimeError) as error:
        told = exhausted_memory(error)
        if told is None:
            raise
        _complain(error, f"reap-stream: {told}.{_resume_hint(arguments)}")
        return ReapStreamError.exit_code
    return 0


def _complain(error: BaseException, text: str) -> None:
    """Tells people of an error, unless another process of the job does."""
    if not is_told(error):
        print(text, file=sys.stderr)  # noqa: T201 - this is the command line


def _resume_hint(arguments: argparse.Namespace) -> str:
    """A sentence that names `--resume`, where there is something for it to go on with."""
    from reap_stream.checkpoint.job import stored_settings

    has_job = hasattr(arguments, "resume") and stored_settings(arguments.output) is not None
    return " The same command with --resume goes on." if has_job else ""


def _let_threads_sleep() -> None:
    """Makes threads that wait for others sleep instead of spin, unless the user chose.

    Products are split among threads that meet again after each. By default a waiting thread spins;
    on a machine that has other work it thereby keeps the one it waits for from running, and the
    pass becomes several times slower. Read by the OpenMP library when torch is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="reap-stream",
        description="Prune Mixture-of-Experts checkpoints layer by layer, straight from disk, "
        "with bounded memory.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"reap-stream {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_plan(commands)
    _add_prune(commands)
    _add_observe(commands)
    _add_compact(commands)
    _add_merge(commands)
    _add_verify(commands)
    _add_eval(commands)
    _add_report(commands)
    _add_batch(commands)
    _add_demo(commands)
    _add_card(commands)
    _add_upload(commands)
    return parser


def _command(
    commands: _Commands, name: str, text: str, *, model: bool = True
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        # argparse formats help with the % operator.
        help=text.replace("%", "%%"),
        description=text[0].upper() + text[1:] + ".",
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.set_defaults(run=_runner(name))
    if model:
        parser.add_argument("model", type=Path, metavar="MODEL", help=MODEL_HELP)
        parser.add_argument(
            "--trust-remote-code", action="store_true", help="let the checkpoint's own code run"
        )
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends defaults to help texts, but for flags and for options that have none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _runner(name: str) -> Callable[[argparse.Namespace], None]:
    def run(arguments: argparse.Namespace) -> None:
        place = launched_place()
        check_command(name, place, evict=getattr(arguments, "evict", False))
        from reap_stream import commands
        from reap_stream.sources import local_sources

        patience = getattr(arguments, "rank_patience", DEFAULT_PATIENCE)
        with open_ranks(place, patience) as arguments.ranks, local_sources(name, arguments):
            getattr(commands, name)(arguments)

    return run


def _add_inspect(commands: _Commands) -> None:
    parser = _command(commands, "inspect", "say what a checkpoint is: layers, experts, formats")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_plan(commands: _Commands) -> None:
    parser = _command(commands, "plan", "say what pruning would give and need, without doing it")
    add_targets(parser)
    add_run_options(parser)
    add_layout(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_prune(commands: _Commands) -> None:
    parser = _command(commands, "prune", "score experts on calibration data and write the rest")
    add_output(parser)
    add_targets(parser)
    add_calibration(parser)
    add_run_options(parser)
    add_writing(parser)
    add_evict(parser)
    add_ranks(parser)


def _add_observe(commands: _Commands) -> None:
    parser = _command(commands, "observe", "score experts on calibration data, write the scores")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="SCORES", help="file to write, .safetensors"
    )
    add_calibration(parser)
    add_run_options(parser)
    add_again(parser)
    add_evict(parser)
    add_ranks(parser)


def _add_compact(commands: _Commands) -> None:
    parser = _command(commands, "compact", "write a pruned checkpoint from saved scores")
    parser.add_argument(
        "--scores", type=Path, required=True, help="file of observe, merge or a pruned checkpoint"
    )
    parser.add_argument(
        "--scores-of-other-weights",
        action="store_true",
        help="the scores are of the same model in other weights, another format perhaps",
    )
    add_output(parser)
    add_targets(parser)
    add_method(parser)
    parser.add_argument("--seed", type=int, default=0, help="of --method random")
    add_writing(parser)
    add_evict(parser)


def _add_merge(commands: _Commands) -> None:
    parser = _command(commands, "merge", "add up the scores of several runs", model=False)
    parser.add_argument("scores", type=Path, nargs="+", metavar="SCORES", help="files to add up")
    parser.add_argument("--output", type=Path, required=True, metavar="SCORES", help="the sum")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _add_verify(commands: _Commands) -> None:
    text = "compare every byte of a pruned checkpoint with its source"
    parser = _command(commands, "verify", text, model=False)
    parser.add_argument("directory", type=Path, metavar="DIR", help="the pruned checkpoint")
    parser.add_argument(
        "--source", type=Path, required=True, metavar="MODEL", help="what it was pruned from"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the source's own code run"
    )
    parser.add_argument(
        "--checksums", action="store_true", help="record hashes of all files, for upload to check"
    )
    add_evict(parser)


def _add_eval(commands: _Commands) -> None:
    text = "measure loss and divergence of pruned models, all in one reading of the source"
    parser = _command(commands, "eval", text, model=False)
    parser.set_defaults(run=_runner("evaluate"))
    add_evaluation(parser)
    add_choice(parser)
    add_forward(parser)
    add_packing(parser)
    add_map(parser)
    add_evict(parser)


def _add_report(commands: _Commands) -> None:
    text = "write what a run found and chose as a page with pictures"
    add_report(_command(commands, "report", text, model=False))


def _add_batch(commands: _Commands) -> None:
    text = "prune many models to many targets: check all jobs first, then run one after another"
    add_batch(_command(commands, "batch", text, model=False))


def _add_demo(commands: _Commands) -> None:
    text = "prune a small trained model that ships to three sizes, verify and evaluate each"
    parser = _command(commands, "demo", text, model=False)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="keep everything there (default: a scratch folder)",
    )


def _add_card(commands: _Commands) -> None:
    text = "render README.md of a pruned checkpoint anew, from its records"
    parser = _command(commands, "card", text, model=False)
    add_card(parser)


def _add_upload(commands: _Commands) -> None:
    text = "check a pruned checkpoint, put it on the Hub and read it back; again, to resume"
    parser = _command(commands, "upload", text, model=False)
    add_upload(parser)
