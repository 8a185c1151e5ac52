"""A job killed at any step and resumed gives the bytes of one that was left alone."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from reap_stream.cli import main
from tests.builders import load_tensors, read_config, write_checkpoint
from tests.killing import count_steps, run
from tests.resuming import (
    MODES,
    contents,
    observe_arguments,
    prune_arguments,
    source_for,
    sweep,
)


@pytest.mark.parametrize(
    ("mode", "stride", "dense_end"),
    [
        ("snapshots", 7, 24),
        ("no-snapshots", 13, 0),
        ("pruned", 13, 0),
        ("pruned-snapshots", 11, 0),
        ("several", 23, 0),
        ("protected", 19, 0),
        ("fp8", 29, 0),
        ("bf16", 37, 0),
    ],
)
def test_killed_prune_resumes_to_the_same_bytes(
    mode, stride, dense_end, tiny, calibration, tmp_path
):
    source = source_for(mode, tiny)

    def arguments(output):
        return prune_arguments(source, output, calibration, *MODES[mode])

    sweep(arguments, tmp_path, (1, stride), dense_end)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "strides"),
    [
        ("snapshots", (1, 2)),
        ("pruned-snapshots", (1, 2)),
        # What is alike in two of them is met by one or the other.
        ("no-snapshots", (1, 4)),
        ("pruned", (3, 4)),
        ("several", (1, 4)),
        ("protected", (3, 4)),
        ("fp8", (1, 4)),
        ("bf16", (3, 4)),
    ],
)
def test_killed_at_every_step(mode, strides, tiny, calibration, tmp_path):
    source = source_for(mode, tiny)
    # Between the end of one call and the begin of the next the disk stays as it is; calls within
    # calls come last, where the result is put into its place.
    sweep(
        lambda out: prune_arguments(source, out, calibration, *MODES[mode]),
        tmp_path,
        strides,
        dense_end=16,
        dense_stride=1,
    )


def test_killed_observe_resumes_to_the_same_bytes(tiny, calibration, tmp_path):
    source = tiny("glm4_moe")
    sweep(lambda out: observe_arguments(source, out, calibration), tmp_path, (1, 5))


def test_killed_compact_resumes_to_the_same_bytes(tiny, calibration, tmp_path):
    source, scores = tiny("glm4_moe"), tmp_path / "scores.safetensors"
    assert main(observe_arguments(source, scores, calibration)) == 0

    def arguments(output):
        return [
            *("compact", str(source), "--scores", str(scores), "--output", str(output)),
            *("--keep", "4,6", "--max-shard-size", "40kB"),
        ]

    sweep(arguments, tmp_path, (1, 13))


def test_killed_twice_resumes_to_the_same_bytes(tiny, calibration, tmp_path):
    source, log = tiny("glm4_moe"), tmp_path / "log"
    whole, output = tmp_path / "whole", tmp_path / "output"
    options = ("--snapshot-minutes", "0")
    assert run(prune_arguments(source, whole, calibration, *options), log) == 0
    arguments = prune_arguments(source, output, calibration, *options)
    assert run(arguments, log, stop_at=12) == -signal.SIGKILL
    for step in (4, 9, 5):
        assert run([*arguments, "--resume"], log, stop_at=step) == -signal.SIGKILL
    assert run([*arguments, "--resume"], log) == 0, log.read_text()
    assert contents(output) == contents(whole)


def test_what_was_finished_is_not_done_again(tiny, calibration, tmp_path):
    source, log = tiny("glm4_moe"), tmp_path / "log"
    whole, output = tmp_path / "whole", tmp_path / "output"
    total = count_steps(prune_arguments(source, whole, calibration, *MODES["snapshots"]), log)
    arguments = prune_arguments(source, output, calibration, *MODES["snapshots"])
    # Late enough that every layer is in the journal.
    assert run(arguments, log, stop_at=total - 24) == -signal.SIGKILL
    assert run([*arguments, "--resume"], log) == 0, log.read_text()
    first, second = (
        json.loads((path / "reap" / "run.json").read_bytes()) for path in (whole, output)
    )
    for name in ("read_nbytes", "written_nbytes"):
        assert second[name] < first[name] / 2


@pytest.fixture
def stopped(tiny, calibration, tmp_path):
    """A job killed after its first layers: arguments, output."""
    output = tmp_path / "output"
    arguments = prune_arguments(tiny("glm4_moe"), output, calibration)
    assert run(arguments, tmp_path / "log", stop_at=14) == -signal.SIGKILL
    return arguments, output


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("--keep", "5", "keep was .*4.*, is .*5"),
        ("--method", "ean", "method was .*reap.*, is .*ean"),
        ("--seed", "7", "seed was 0, is 7"),
        ("--max-shard-size", "50kB", "max_shard_nbytes was 40000, is 50000"),
        ("--mtp", "drop", "mtp was .*score.*, is .*drop"),
        ("--propagate", "pruned", "propagate was .*original.*, is .*pruned"),
        ("--batch-tokens", "24", "batch_tokens was 72, is 24"),
        ("--compute-dtype", "bfloat16", "compute_dtype was .*float32.*, is .*bfloat16"),
        ("--sequence-length", "8", "calibration_sha256 was"),
        ("--protect", "super", "protect was .*none.*, is .*super"),
        ("--source-weights", "FIRST=2", r"source_weights was \{\}, is .*rows-0\.npy"),
    ],
)
def test_other_settings_are_refused_by_name(option, value, name, stopped, capsys):
    arguments, output = stopped
    value = value.replace("FIRST", arguments[arguments.index("--calibration") + 1])
    changed = [*arguments, "--resume"]
    if option in changed:
        changed[changed.index(option) + 1] = value
    else:
        changed += [option, value]
    assert main(changed) == 2
    assert re.search(name, capsys.readouterr().err)
    assert not output.exists()


def test_another_source_is_refused(stopped, tiny, capsys):
    arguments, output = stopped
    other = [*arguments, "--resume"]
    other[1] = str(tiny("glm4_moe", moe_intermediate_size=24))
    assert main(other) == 2
    assert "source was" in capsys.readouterr().err
    assert not output.exists()


def test_the_same_source_elsewhere_and_another_budget_are_not(stopped, tmp_path):
    arguments, output = stopped
    moved = tmp_path / "moved"
    source = Path(arguments[1])
    write_checkpoint(moved, load_tensors(source), read_config(source))
    for file in source.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    again = [*arguments, "--resume", "--memory", "8GiB"]
    again[1] = str(moved)
    log = tmp_path / "log"
    assert run(again, log) == 0, log.read_text()
    assert output.is_dir()


def test_a_half_done_job_is_named_and_overwrite_starts_anew(stopped, tmp_path, capsys):
    arguments, output = stopped
    assert main(arguments) == 2
    assert "--resume to go on, --overwrite to start anew" in capsys.readouterr().err
    log = tmp_path / "log"
    assert run([*arguments, "--overwrite"], log) == 0, log.read_text()
    assert output.is_dir()


def test_resume_without_a_job_is_refused(tiny, calibration, tmp_path, capsys):
    arguments = prune_arguments(tiny("glm4_moe"), tmp_path / "output", calibration, "--resume")
    assert main(arguments) == 2
    assert "no half-done job" in capsys.readouterr().err


@pytest.mark.parametrize("step", [9, 15, 21])
def test_an_interrupt_names_resume_and_can_be_resumed(step, tiny, calibration, tmp_path):
    source, log, output = tiny("glm4_moe"), tmp_path / "log", tmp_path / "output"
    whole = tmp_path / "whole"
    assert run(prune_arguments(source, whole, calibration), log) == 0
    arguments = prune_arguments(source, output, calibration)
    assert run(arguments, log, stop_at=step, with_signal=signal.SIGINT) == 130
    assert "--resume" in log.read_text()
    assert not output.exists()
    assert run([*arguments, "--resume"], log) == 0, log.read_text()
    assert contents(output) == contents(whole)


def test_overwrite_keeps_the_old_output_until_the_new_is_whole(tiny, calibration, tmp_path):
    source, log, output = tiny("glm4_moe"), tmp_path / "log", tmp_path / "output"
    before, fresh = tmp_path / "before", tmp_path / "fresh"
    assert run(prune_arguments(source, before, calibration, "--keep", "6"), log) == 0
    assert run(prune_arguments(source, fresh, calibration), log) == 0
    old, new = contents(before), contents(fresh)
    arguments = [*prune_arguments(source, output, calibration), "--overwrite"]
    shutil.copytree(before, output)
    total = count_steps(arguments, log)
    found = []
    for step in sorted({*range(1, total, 19), *range(total - 16, total, 3)}):
        shutil.rmtree(output)
        shutil.copytree(before, output)
        assert run(arguments, log, stop_at=step) == -signal.SIGKILL
        # At no moment is there anything but the old output or the new one, whole.
        assert contents(output) in (old, new), step
        found.append(contents(output) == new)
    assert found == sorted(found)
    assert set(found) == {True, False}


def test_scores_are_those_of_an_uninterrupted_run(stopped, tiny, calibration, tmp_path):
    arguments, output = stopped
    log, whole = tmp_path / "log", tmp_path / "whole"
    assert run([*arguments, "--resume"], log) == 0
    assert run(prune_arguments(tiny("glm4_moe"), whole, calibration), log) == 0
    name = "reap/scores.safetensors"
    mine, theirs = load_file(output / name), load_file(whole / name)
    assert mine.keys() == theirs.keys()
    for key, array in theirs.items():
        np.testing.assert_array_equal(mine[key], array, err_msg=key)
