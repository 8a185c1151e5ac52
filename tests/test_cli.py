"""The command line from end to end: status, what is printed where, and what the files hold."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import reap_stream
from reap_stream.cli import main
from reap_stream.settings import parse_nbytes
from tests.builders import make_rows, write_rows
from tests.engine import read_kept


@pytest.fixture
def command(tiny, calibration, tmp_path, capsys):
    """Runs a command line on the tiny model; status, standard output, standard error."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def running(specs):
    options = [item for spec in specs for item in ("--calibration", spec)]
    return [*options, "--compute-dtype", "float32", "--device", "cpu", "--batch-tokens", "72"]


def test_prune_then_verify(command, tiny, calibration, tmp_path):
    source, output = tiny("glm4_moe"), tmp_path / "pruned"
    specs = [f"{calibration[0]}:99", *calibration[1:]]
    status, out, err = command(
        "prune", source, "--output", output, "--sparsity", "0.5", *running(specs)
    )
    assert status == 0
    assert out.startswith(f"{output}: ")
    assert "peak memory" in out
    # Rows that were asked for and are not there.
    assert "rows, 99 were asked for" in err
    status, out, err = command("verify", output, "--source", source)
    assert (status, err) == (0, "")
    assert "4 experts in each of 2 decoder layers; " in out


def test_verify_names_the_targets_of_a_directory_of_several(command, tiny, calibration, tmp_path):
    source, output = tiny("glm4_moe"), tmp_path / "pruned"
    arguments = ["--output", output, "--keep", "4,6", *running(calibration)]
    status, out, _ = command("prune", source, *arguments)
    assert status == 0
    assert out.startswith(f"{output / 'keep-4'}, {output / 'keep-6'}: ")
    status, _, err = command("verify", output, "--source", source)
    assert status == 2
    assert "keep-4, keep-6" in err


def test_plan_and_observe_take_the_common_options(command, tiny, calibration, tmp_path):
    source = tiny("glm4_moe")
    common = ["--method", "ean", "--propagate", "original"]
    writing = ["--mtp", "drop", "--max-shard-size", "20KB"]
    status, out, _ = command(
        "plan", source, "--keep", "4", "--device", "cpu", *common, *writing, "--json"
    )
    assert status == 0
    assert json.loads(out)["variants"][0]["shards"] > 1
    scores = tmp_path / "scores.safetensors"
    arguments = ["observe", source, "--output", scores, *running(calibration)]
    assert command(*arguments, *common)[0] == 0
    status, _, err = command(*arguments, "--overwrite", "--propagate", "pruned")
    assert status == 2
    assert "observe has none" in err


def test_verify_finds_one_changed_byte(command, tiny, calibration, tmp_path):
    source, output = tiny("glm4_moe"), tmp_path / "pruned"
    assert (
        command("prune", source, "--output", output, "--keep", "4", *running(calibration))[0] == 0
    )
    shard = next(output.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    status, _, err = command("verify", output, "--source", source)
    assert status == 1
    assert "faults: 1" in err


def test_observe_merge_compact(command, tiny, calibration, tmp_path):
    source = tiny("glm4_moe")
    parts = []
    for number, spec in enumerate(calibration):
        parts.append(tmp_path / f"part-{number}.safetensors")
        assert command("observe", source, "--output", parts[-1], *running([spec]))[0] == 0
    merged = tmp_path / "merged.safetensors"
    status, out, _ = command("merge", *parts, "--output", merged)
    assert status == 0
    assert all(spec in out for spec in calibration)
    compacted, pruned = tmp_path / "compacted", tmp_path / "pruned"
    arguments = ["--scores", merged, "--output", compacted, "--keep", "4"]
    assert command("compact", source, *arguments)[0] == 0
    assert (
        command("prune", source, "--output", pruned, "--keep", "4", *running(calibration))[0] == 0
    )
    assert read_kept(compacted) == read_kept(pruned)
    mine, theirs = load_file(merged), load_file(pruned / "reap" / "scores.safetensors")
    assert mine.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(mine[name], array, rtol=1e-4, err_msg=name)
    assert command("verify", compacted, "--source", source)[0] == 0


def test_merging_the_same_labels_adds(command, tiny, tmp_path):
    source, runs, double = tiny("glm4_moe"), [], tmp_path / "double.safetensors"
    for seed in range(2):
        specs = write_rows(tmp_path / "rows", make_rows(seed))
        runs.append(tmp_path / f"{seed}.safetensors")
        assert command("observe", source, "--output", runs[-1], *running(specs))[0] == 0
    assert command("merge", *runs, "--output", double)[0] == 0
    one, other, sums = map(load_file, (*runs, double))
    for name, array in one.items():
        combine = np.maximum if name.endswith("_max") else np.add
        np.testing.assert_array_equal(sums[name], combine(array, other[name]))


def test_merging_the_same_rows_twice_is_refused(command, tiny, calibration, tmp_path):
    one, double = tmp_path / "one.safetensors", tmp_path / "double.safetensors"
    assert command("observe", tiny("glm4_moe"), "--output", one, *running(calibration))[0] == 0
    status, _, err = command("merge", one, one, "--output", double)
    assert status == 2
    assert "scores 2 were taken on the same calibration rows as scores 1" in err
    assert not double.exists()


def test_merge_replaces_a_file_only_when_told(command, tiny, calibration, tmp_path):
    scores = tmp_path / "scores.safetensors"
    arguments = ["observe", tiny("glm4_moe"), "--output", scores, *running(calibration)]
    assert command(*arguments)[0] == 0
    before = scores.read_bytes()
    status, _, err = command("merge", scores, "--output", scores)
    assert status == 2
    assert "exists already" in err
    status, _, err = command(*arguments)
    assert status == 2
    assert "exists already" in err
    assert scores.read_bytes() == before
    assert command(*arguments, "--overwrite")[0] == 0


def test_scores_of_another_model_are_refused(command, tiny, calibration, tmp_path):
    scores = tmp_path / "scores.safetensors"
    arguments = ["--output", scores, *running(calibration)]
    assert command("observe", tiny("glm4_moe"), *arguments)[0] == 0
    output = tmp_path / "out"
    status, _, err = command(
        "compact", tiny("qwen3_moe"), "--scores", scores, "--output", output, "--keep", "4"
    )
    assert status == 2
    assert "another model" in err
    assert not output.exists()


def test_damaged_scores_are_refused(command, tiny, tmp_path):
    scores = tmp_path / "scores.safetensors"
    scores.write_bytes(b"nothing of the kind")
    arguments = ["--scores", scores, "--output", tmp_path / "out", "--keep", "4"]
    status, _, err = command("compact", tiny("glm4_moe"), *arguments)
    assert status == 2
    assert str(scores) in err


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "reap_stream", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"reap-stream {reap_stream.__version__}\n"


@pytest.mark.parametrize(
    "name", ["inspect", "plan", "prune", "observe", "compact", "merge", "verify", "demo"]
)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"reap-stream {name}" in capsys.readouterr().out


def test_public_names_are_there():
    assert set(reap_stream.__all__) <= set(dir(reap_stream)) | set(reap_stream._HOMES)
    for name in reap_stream.__all__:
        assert getattr(reap_stream, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = reap_stream.frobnicate


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GiB", 8 << 30), ("5GB", 5 * 10**9), ("1.5 kib", 1536), ("500000000", 500_000_000)],
)
def test_amounts_of_memory(text, nbytes):
    assert parse_nbytes(text) == nbytes
