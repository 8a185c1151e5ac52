"""A rank killed at any step ends the job with a clear error, and any number of ranks can resume it."""

from __future__ import annotations

import itertools
import signal

import pytest

from tests.killing import run
from tests.rank_processes import printed, run_ranks, steps_of
from tests.rank_results import assert_same_scores, decided
from tests.resuming import observe_arguments, prune_arguments

SNAPSHOTS = ("--snapshot-minutes", "0")


def compare(output, whole):
    """Whatever was killed, what is there in the end is what one process writes."""
    if output.is_file():
        assert_same_scores(output, whole)
    else:
        assert decided(output) == decided(whole)


def resume(arguments, log, size):
    """Goes on with a job; with one process if `size` is 1."""
    if size == 1:
        assert run([*arguments, "--resume"], log) == 0, log.read_text()
        return
    statuses = run_ranks([*arguments, "--resume"], log, size)
    assert statuses == [0] * size, printed(log, size)


def kill_one(arguments, output, whole, stop, sizes, log):
    """Kills a rank at a step; what the others say; goes on, and compares what it leaves."""
    size, next_size = sizes
    # That none of them hangs is seen there.
    statuses = run_ranks(arguments, log, size, stop=stop)
    rank, _ = stop
    assert statuses[rank] == -signal.SIGKILL, (stop, statuses, printed(log, size))
    text = "".join(printed(log, size))
    others = statuses[:rank] + statuses[rank + 1 :]
    job = output.parent / f".{output.name}.reap-job"
    if 0 in others:
        # It had nothing left to do with the others.
        assert output.exists(), stop
    else:
        assert others == [1] * (size - 1), (stop, statuses, text)
        assert "Traceback" not in text, (stop, text)
        assert text.count("reap-stream: ") == 1, (stop, text)
        assert f"rank {rank} (process " in text, (stop, text)
    if (job / "job.json").exists():
        assert 0 in others or "The same command with --resume goes on." in text, (stop, text)
        resume(arguments, log, next_size)
        assert not job.exists(), stop
    elif not output.exists():
        assert run(arguments, log) == 0, (stop, log.read_text())
    compare(output, whole)


def sweep(make_arguments, tmp_path, ranks, steps):
    """Kills ranks of a job at some of their steps; goes on with 2, 1 and 3 ranks in turns.

    Args:
        make_arguments: gives the command line that writes an output.
        tmp_path: where.
        ranks: how many ranks there are, and which of them are killed.
        steps: the first step, and the distance to the next.
    """
    whole, log = tmp_path / "whole", tmp_path / "log"
    assert run(make_arguments(whole), log) == 0, log.read_text()
    next_sizes = itertools.cycle((2, 1, 3))
    size, killed = ranks
    for rank in killed:
        counted = tmp_path / f"counted-{rank}"
        assert run_ranks(make_arguments(counted), log, size, stop=(rank, 0)) == [0] * size
        compare(counted, whole)
        total = steps_of(log, rank)
        assert total > steps[0]
        for step in range(steps[0] + rank, total + 1, steps[1]):
            output = tmp_path / f"killed-{rank}-{step}"
            sizes = size, next(next_sizes)
            kill_one(make_arguments(output), output, whole, (rank, step), sizes, log)


def test_killed_prune_resumes_with_any_number_of_ranks(tiny, calibration, tmp_path):
    source = tiny("glm4_moe")

    def arguments(output):
        return prune_arguments(source, output, calibration, *SNAPSHOTS)

    sweep(arguments, tmp_path, (2, (0, 1)), (14, 41))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(2, (0,)), (2, (1,)), (3, (0,)), (3, (2,))])
@pytest.mark.parametrize(
    ("first", "options"),
    [
        (1, ()),
        (8, SNAPSHOTS),
        (15, ("--propagate", "pruned", *SNAPSHOTS)),
        (22, ("--keep", "4,6", "--protect", "super", *SNAPSHOTS)),
    ],
    ids=["no-snapshots", "snapshots", "pruned", "protected"],
)
def test_killed_at_many_steps(ranks, first, options, tiny, calibration, tmp_path):
    source = tiny("glm4_moe")

    def arguments(output):
        return prune_arguments(source, output, calibration, *options)

    sweep(arguments, tmp_path, ranks, (first, 37))


@pytest.mark.slow
def test_killed_observe_resumes_with_any_number_of_ranks(tiny, calibration, tmp_path):
    source = tiny("glm4_moe")
    sweep(
        lambda output: observe_arguments(source, output, calibration),
        tmp_path,
        (2, (0, 1)),
        (1, 5),
    )
