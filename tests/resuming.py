"""Runs that are killed and resumed, and what they must leave: the bytes of one left alone."""

from __future__ import annotations

import json
import signal

from tests.engine import BATCH_TOKENS
from tests.killing import count_steps, run

# What a run says of itself and no resumed one can repeat.
OF_THE_RUN = {
    "seconds",
    "read_nbytes",
    "written_nbytes",
    "peak_resident_nbytes",
    "memory",
    "stages",
}


MODES = {
    "snapshots": ["--snapshot-minutes", "0"],
    "no-snapshots": [],
    "pruned": ["--propagate", "pruned"],
    "pruned-snapshots": ["--propagate", "pruned", "--snapshot-minutes", "0"],
    "several": ["--keep", "4,6", "--snapshot-minutes", "0"],
    "protected": ["--keep", "4,6", "--protect", "super", "--snapshot-minutes", "0"],
    "fp8": ["--weights", "fp8", "--snapshot-minutes", "0"],
    "bf16": ["--weights", "bf16", "--keep", "4,6"],
}


# Linear layers that are written as FP8 have 128 inputs and outputs or more.
WIDE = {"hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4}


def prune_arguments(source, output, calibration, *options):
    arguments = ["prune", str(source), "--output", str(output)]
    for spec in calibration:
        arguments += ["--calibration", spec]
    arguments += ["--batch-tokens", str(BATCH_TOKENS), "--compute-dtype", "float32"]
    arguments += ["--device", "cpu", "--max-shard-size", "40kB", *options]
    return arguments if "--keep" in options else [*arguments, "--keep", "4"]


def source_for(mode, tiny):
    return tiny("glm4_moe", **WIDE) if mode == "fp8" else tiny("glm4_moe")


def contents(path):
    """Every file below a path, the facts of a single run left out of its record."""
    if path.is_file():
        return {"": path.read_bytes()}
    found = {}
    for file in sorted(path.rglob("*")):
        if file.name == "run.json":
            record = json.loads(file.read_bytes())
            found[file.relative_to(path)] = {
                key: value for key, value in record.items() if key not in OF_THE_RUN
            }
        elif file.is_file():
            found[file.relative_to(path)] = file.read_bytes()
    return found


def kill_and_resume(arguments, output, expected, step):
    """Kills a run at a step, resumes it, and compares what it leaves."""
    log = output.with_suffix(".log")
    assert run(arguments, log, stop_at=step) == -signal.SIGKILL, log.read_text()
    job = output.parent / f".{output.name}.reap-job"
    if (job / "job.json").exists():
        assert run([*arguments, "--resume"], log) == 0, (step, log.read_text())
        assert not job.exists(), step
    elif not output.exists():
        # There was no job yet: the command itself starts anew.
        assert run(arguments, log) == 0, (step, log.read_text())
    assert contents(output) == expected, step


def sweep(make_arguments, tmp_path, strides, dense_end=0, dense_stride=2):
    """Kills runs at steps from one on by another, and at more of the last `dense_end`."""
    whole = tmp_path / "whole"
    total = count_steps(make_arguments(whole), tmp_path / "log")
    expected = contents(whole)
    assert total > 20
    dense = range(total - dense_end + 1, total + 1, dense_stride)
    for step in sorted({*range(strides[0], total + 1, strides[1]), *dense}):
        output = tmp_path / f"killed-{step}"
        kill_and_resume(make_arguments(output), output, expected, step)


def observe_arguments(source, output, calibration):
    arguments = prune_arguments(source, output, calibration, "--snapshot-minutes", "0")
    arguments[0] = "observe"
    at = arguments.index("--max-shard-size")
    return [*arguments[:at], *arguments[at + 2 : -2]]
