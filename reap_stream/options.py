"""Options that several commands share. No torch at import."""

from __future__ import annotations

import argparse
from pathlib import Path

from reap_stream.calibration.schemas import MAP_TARGETS
from reap_stream.ranks.launch import DEFAULT_PATIENCE
from reap_stream.settings import MTP_CHOICES, WEIGHT_CHOICES

MODEL_HELP = "directory of a checkpoint, or a model on the Hub: org/name[@revision]"
_SPEC = (
    "PATH[:N] (.jsonl, .parquet, .txt, .npy), HUB_ID[CONFIG](SPLIT):N or builtin[:NAME][:N]; give "
    "it several times for a mix, scores are kept for each"
)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where a pruned checkpoint is written."""
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory of the pruned checkpoint; with several targets DIR/keep-N for each",
    )


def add_targets(parser: argparse.ArgumentParser) -> None:
    """How many experts go."""
    targets = parser.add_mutually_exclusive_group(required=True)
    targets.add_argument(
        "--sparsity", metavar="S[,S…]", help="fractions of routed experts to remove, e.g. 0.25,0.4"
    )
    targets.add_argument("--keep", metavar="N[,N…]", help="experts to keep in every layer")


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """The data that experts are scored on."""
    parser.add_argument("--calibration", action="append", required=True, metavar="SPEC", help=_SPEC)
    add_packing(parser)
    add_map(parser)


def add_map(parser: argparse.ArgumentParser) -> None:
    """Which fields of records hold what."""
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="TARGET=FIELD[,…]",
        help="name fields of records that are not known by themselves, e.g. "
        f"user=question,assistant=turn.answer; targets: {', '.join(MAP_TARGETS)}",
    )


def add_packing(parser: argparse.ArgumentParser) -> None:
    """What numbers of rows count."""
    parser.add_argument(
        "--pack",
        action="store_true",
        help="let N and --samples count packs of --sequence-length tokens: whole documents until "
        "they are full, none of which sees another",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How the model is run and scored."""
    add_forward(parser)
    parser.add_argument(
        "--propagate",
        choices=("original", "pruned"),
        default="original",
        help="whose activations later layers see; observe prunes nothing and takes original only",
    )
    add_method(parser)


def add_forward(parser: argparse.ArgumentParser) -> None:
    """How the model is run."""
    add = parser.add_argument
    add("--samples", type=int, default=512, help="most rows of a SPEC without its own number")
    add("--sequence-length", type=int, default=2048, help="most tokens of a row")
    add("--batch-tokens", type=int, help="tokens that run together (default: by memory)")
    add("--seed", type=int, default=0, help="of every random choice")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:i")
    add(
        "--compute-dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of the forward",
    )
    add(
        "--memory",
        metavar="SIZE",
        help="host memory to stay within, e.g. 8GiB (default: most of what is free)",
    )


def add_method(parser: argparse.ArgumentParser) -> None:
    """How experts are scored, and chosen by their scores."""
    parser.add_argument(
        "--method",
        choices=("reap", "ean", "frequency", "gate", "random"),
        default="reap",
        help="criterion, which observe only notes down: mean of gate weight × output norm, mean output norm, routed tokens, mean "
        "gate weight, or chance",
    )
    add_choice(parser)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """What bears on the choice of experts beside the criterion."""
    parser.add_argument(
        "--source-weights",
        metavar="SOURCE=W[,…]",
        help="how often tokens of a calibration source count, e.g. code.jsonl=2,prose.jsonl=0.5: a "
        "SPEC, with or without its :N, and a number; others count once, 0 leaves a source out",
    )
    parser.add_argument(
        "--protect",
        choices=("none", "super"),
        default="none",
        help="experts to keep whatever their score: super: the few with the largest outputs of the "
        "model's first three quarters (arXiv 2507.23279); prune then chooses after the pass and "
        "reads the experts a second time",
    )


def add_writing(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint is written, and what happens to one that is there."""
    add_layout(parser)
    add_again(parser)


def add_layout(parser: argparse.ArgumentParser) -> None:
    """In which form a checkpoint is written."""
    add = parser.add_argument
    add(
        "--weights",
        choices=WEIGHT_CHOICES,
        default="keep",
        help="format of the kept weights: as they are, FP8 in blocks of 128 x 128, FP8 by output "
        "channel, or bfloat16 (for converters to GGUF)",
    )
    add(
        "--fp8-experts-only",
        action="store_true",
        help="write routed experts alone as FP8, all else as it is",
    )
    add("--max-shard-size", default="5GB", metavar="SIZE", help="most bytes of a shard")
    add(
        "--mtp",
        choices=MTP_CHOICES,
        help="next-token-prediction layers: score runs and prunes them by their own routing, match "
        "prunes them like the last MoE layer, keep leaves them as they are, drop leaves them out "
        "(default: score, or match with a warning where they cannot be run)",
    )


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """What is evaluated, on what, and where the result goes."""
    add = parser.add_argument
    add(
        "models",
        type=Path,
        nargs="+",
        metavar="MODEL",
        help="directories of checkpoints; the first is what all others are compared with",
    )
    add("--trust-remote-code", action="store_true", help="let the checkpoints' own code run")
    add(
        "--text",
        action="append",
        required=True,
        metavar="SPEC",
        help="held-out text, as --calibration of prune; give it several times to see each apart",
    )
    add(
        "--scores",
        type=Path,
        action="append",
        default=[],
        help="evaluate prunings of the first MODEL that were never written: experts chosen by this "
        "file of observe, merge or a pruned checkpoint; with --sparsity or --keep",
    )
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument("--sparsity", metavar="S[,S…]", help="fractions of experts to remove")
    targets.add_argument("--keep", metavar="N[,N…]", help="experts to keep in every layer")
    add("--method", default="reap", metavar="M[,M…]", help="criteria by which experts are chosen")
    add("--json", action="store_true", help="as JSON")
    add(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="also write the JSON there",
    )
    add(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="directory on a disk for hidden states that memory has no room for (default: beside "
        "--output, else the system's directory for temporary files, which may be memory too)",
    )
    add("--overwrite", action="store_true", help="replace an existing FILE.json")


def add_again(parser: argparse.ArgumentParser) -> None:
    """What happens to an output that is there."""
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--resume", action="store_true", help="go on with a half-done job")
    parser.add_argument(
        "--snapshot-minutes",
        type=float,
        default=5.0,
        help="least time between two saves of the hidden states",
    )


def add_evict(parser: argparse.ArgumentParser) -> None:
    """What happens to shards of a model on the Hub."""
    parser.add_argument(
        "--evict",
        action="store_true",
        help="of a model on the Hub: keep its shards beside the output (eval: in --scratch) instead "
        "of in the cache, and delete each once no later layer needs it",
    )


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """How several processes wait for each other."""
    parser.add_argument(
        "--rank-patience",
        type=float,
        default=DEFAULT_PATIENCE,
        metavar="MINUTES",
        help="with several processes (torchrun): minutes after which one that does not answer counts "
        "as gone",
    )


def add_card(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint's card, and what is new to it."""
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="the pruned checkpoint")
    add(
        "--eval",
        type=Path,
        metavar="FILE.json",
        help="result of `eval --json` or `eval --output` with the source first and this checkpoint "
        "after it; it is copied to DIR/reap/eval.json",
    )
    add(
        "--base-model",
        metavar="ORG/NAME[@REVISION]",
        help="the source's id on the Hub, where it was given as a directory",
    )


def add_upload(parser: argparse.ArgumentParser) -> None:
    """What goes where on the Hub."""
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="the pruned checkpoint")
    add("repository", metavar="REPO_ID", help="its repository, org/name; made if it is not there")
    add("--public", action="store_true", help="everyone may see it (default: private)")
    add("--revision", metavar="BRANCH", help="branch to write to (default: main)")
    add("--commit-message", metavar="TEXT", help="first line of the commit's message")
    add(
        "--dry-run",
        action="store_true",
        help="list every file and its length; nothing is asked of the Hub",
    )
