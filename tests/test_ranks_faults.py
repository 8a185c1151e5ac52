"""What goes wrong on one rank ends all of them, is told once, and leaves a job to go on with."""

from __future__ import annotations

import os
import re
import signal
from functools import partial

import numpy as np
import pytest
import torch

from reap_stream import shared_job
from reap_stream.checkpoint.lock import Lock
from reap_stream.checkpoint.reader import Reader
from reap_stream.cli import main
from reap_stream.errors import ReadError
from reap_stream.ranks import launch
from reap_stream.scoring.choosing import Chooser
from tests.builders import load_tensors
from tests.hub_server import serving
from tests.killing import run
from tests.model_hub_client import point_at
from tests.rank_processes import on_two_machines, printed, rank_environments, run_ranks
from tests.rank_results import decided
from tests.resuming import prune_arguments


@pytest.fixture
def job(tiny, calibration, tmp_path):
    """The arguments of a job, its output, and where ranks print."""
    output = tmp_path / "output"
    arguments = prune_arguments(tiny("glm4_moe"), output, calibration)
    return arguments, output, tmp_path / "log"


@pytest.fixture
def waits(monkeypatch):
    """How often a rank that says nothing waited for the one that does."""
    found = []
    monkeypatch.setattr(launch, "_let_first_speak", lambda: found.append(1))
    return found


def told_once(log, size, pattern):
    """The one complaint of all ranks."""
    texts = printed(log, size)
    complaints = [line for text in texts for line in text.splitlines() if "reap-stream: " in line]
    assert len(complaints) == 1, texts
    assert re.search(pattern, complaints[0]), complaints
    assert not any("Traceback" in text for text in texts), texts
    return complaints[0]


def swapped(arguments, option, value):
    """The same arguments with another value of an option."""
    at = arguments.index(option)
    return [*arguments[: at + 1], str(value), *arguments[at + 2 :]]


def unreadable(rank):
    """Lets the second rank fail when it has read some layers."""
    if rank == 1:
        read, seen = Reader.read_into, [0]

        def failing(reader, requests):
            seen[0] += 1
            if seen[0] > 8:
                message = "shard.safetensors: the disk is gone"
                raise ReadError(message)
            return read(reader, requests)

        Reader.read_into = failing


def unreadable_on_another_machine(rank):
    on_two_machines(rank)
    unreadable(rank)


def choosing_otherwise(rank):
    if rank == 1:
        choose = Chooser.choose
        Chooser.choose = lambda self, layer, stats, keep: tuple(
            7 - expert for expert in reversed(choose(self, layer, stats, keep))
        )


def broken(rank):
    """Lets the second rank fail as only a defect would."""
    if rank == 1:
        Chooser.choose = None


def work_in(parent, rank):
    os.chdir(parent / str(rank))


def with_hub(url, cache, rank):
    point_at(pytest.MonkeyPatch(), url, cache)


def impatient(rank):
    shared_job._SHARING_SECONDS = 0.5


def test_one_ranks_error_is_every_ranks(job, tmp_path):
    arguments, output, log = job
    assert run_ranks(arguments, log, 3, prepare=unreadable) == [1, 1, 1]
    text = told_once(log, 3, r"rank 1 \(process \d+ on .*\): shard.safetensors: the disk is gone")
    assert text.endswith("The same command with --resume goes on.")
    assert "rank 1" in printed(log, 3)[0]
    whole = tmp_path / "whole"
    assert run([*swapped(arguments, "--output", whole)], log) == 0
    assert run_ranks([*arguments, "--resume"], log, 2) == [0, 0], printed(log, 2)
    assert decided(output) == decided(whole)


def test_a_defect_of_one_rank_is_named_by_the_first(job):
    arguments, _, log = job
    statuses = run_ranks(arguments, log, 2, prepare=broken)
    assert statuses == [1, 1]
    texts = printed(log, 2)
    assert re.search(r"reap-stream: rank 1 .*: TypeError: .*NoneType", texts[0]), texts


def test_ranks_that_choose_differently_are_stopped(job):
    arguments, output, log = job
    assert run_ranks(arguments, log, 2, prepare=choosing_otherwise) == [1, 1]
    told_once(log, 2, r"rank 1 finished .* where rank 0 finished .*the same experts")
    assert not output.exists()


def test_an_output_that_is_there_is_refused_once(job):
    arguments, output, log = job
    output.mkdir()
    (output / "file").touch()
    assert run_ranks(arguments, log, 3) == [2, 2, 2]
    told_once(log, 3, r"^reap-stream: .*output: exists already; --overwrite")


def test_other_calibration_data_is_refused_before_the_job_begins(job, calibration, tmp_path):
    arguments, output, log = job
    # The same path on two machines, where the files are not the same.
    rows = np.load(calibration[0])
    for rank, array in enumerate((rows, rows[:, ::-1])):
        (tmp_path / str(rank)).mkdir()
        np.save(tmp_path / str(rank) / "rows.npy", array)
    arguments = swapped(arguments, "--calibration", "rows.npy")
    assert run_ranks(arguments, log, 2, prepare=partial(work_in, tmp_path)) == [2, 2]
    told_once(log, 2, r'calibration_sha256 is "\w+" on rank 1 and "\w+" on rank 0: all ranks need')
    assert not list(tmp_path.glob(".*"))
    assert not output.exists()


def test_another_seed_on_one_rank_is_refused(job):
    arguments, _, log = job
    assert run_ranks([arguments, [*arguments, "--seed", "3"]], log, 2) == [2, 2]
    told_once(log, 2, r"seed is 3 on rank 1 and 0 on rank 0")


def test_a_directory_that_is_not_shared_is_refused(job, tmp_path):
    arguments, _, log = job
    other = tmp_path / "elsewhere" / "output"
    other.parent.mkdir()
    each = [arguments, swapped(arguments, "--output", other)]
    assert run_ranks(each, log, 2, prepare=impatient) == [2, 2]
    told_once(log, 2, r"rank 1 \(process .*: .*elsewhere/.*not seen by rank 1 .*a file system they")
    # No half-done job is left for the next command to stumble over.
    assert not list(tmp_path.glob(".*")) + list(other.parent.iterdir())


def test_an_error_is_told_once_on_each_machine(job):
    arguments, _, log = job
    assert run_ranks(arguments, log, 3, prepare=unreadable_on_another_machine) == [1, 1, 1]
    texts = printed(log, 3)
    assert ["the disk is gone" in text for text in texts] == [True, True, False]
    assert re.search(r"rank 1 \(process \d+ on odd\): shard", texts[0])
    assert re.search(r"^reap-stream: shard", texts[1], re.MULTILINE)


def test_of_a_rank_on_another_machine_no_process_is_named(job):
    arguments, _, log = job
    statuses = run_ranks(arguments, log, 3, stop=(1, 20), prepare=on_two_machines)
    assert statuses == [1, -signal.SIGKILL, 1]
    told_once(log, 3, r"connection to another rank was lost; ranks run on even and odd too")


def test_no_job_begins_while_a_rank_of_an_earlier_one_is_left(job, capsys):
    arguments, output, log = job
    assert -signal.SIGKILL in run_ranks(arguments, log, 2, stop=(0, 20))
    left = Lock.join(output.parent / ".output.reap-job" / "ranks")
    for option in ("--resume", "--overwrite"):
        assert main([*arguments, option]) == 2
        assert "a rank of an earlier run has not ended yet" in capsys.readouterr().err
    left.release()
    assert run_ranks([*arguments, "--resume"], log, 2) == [0, 0], printed(log, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_told_to_end_leaves_a_job_to_resume(rank, number, job, tmp_path):
    arguments, output, log = job
    statuses = run_ranks(arguments, log, 2, stop=(rank, 22), with_signal=number)
    assert statuses[rank] == 130, printed(log, 2)
    assert statuses[1 - rank] == 1, printed(log, 2)
    texts = "".join(printed(log, 2))
    assert texts.count("reap-stream: ") == 1, texts
    assert "The same command with --resume goes on." in texts
    assert "Traceback" not in texts, texts
    whole = tmp_path / "whole"
    assert run(swapped(arguments, "--output", whole), log) == 0
    assert run([*arguments, "--resume"], log) == 0
    assert decided(output) == decided(whole)


@pytest.mark.slow
def test_a_rank_that_does_not_answer_counts_as_gone(job):
    arguments, _, log = job
    patience = ("--rank-patience", "0.15")
    statuses = run_ranks([*arguments, *patience], log, 2, stop=(1, 20), with_signal=signal.SIGSTOP)
    assert statuses == [1, -signal.SIGKILL], printed(log, 2)
    told_once(log, 2, r"a rank did not answer within 0.15 minutes .*finished layers are kept")


def test_snapshots_of_another_number_of_ranks_go(tiny, calibration, tmp_path):
    output, log = tmp_path / "output", tmp_path / "log"
    snapshots = ("--snapshot-minutes", "0")
    arguments = prune_arguments(tiny("glm4_moe"), output, calibration, *snapshots)
    assert -signal.SIGKILL in run_ranks(arguments, log, 3, stop=(0, 40))
    hidden = tmp_path / ".output.reap-job" / "hidden"
    assert [path for path in hidden.iterdir() if "-of-3." in path.name]
    # Begun before the first layer, and killed once a snapshot of its own is whole.
    assert run([*arguments, "--resume"], log, stop_at=5) == -signal.SIGKILL
    assert [path.name for path in hidden.iterdir()] == ["layer-1.safetensors"]
    assert run_ranks([*arguments, "--resume"], log, 2) == [0, 0], printed(log, 2)


def test_a_model_of_the_hub_is_fetched_by_several_ranks(tiny, calibration, tmp_path):
    source, log = tiny("glm4_moe", num_nextn_predict_layers=0), tmp_path / "log"
    whole, output = tmp_path / "whole", tmp_path / "output"
    assert run(prune_arguments(source, whole, calibration), log) == 0, log.read_text()
    with serving() as server:
        server.add("org/worked-on-moe", source)
        arguments = prune_arguments("org/worked-on-moe", output, calibration)
        prepare = partial(with_hub, server.url, tmp_path / "cache")
        assert run_ranks(arguments, log, 2, prepare=prepare) == [0, 0], printed(log, 2)
    found, expected = load_tensors(output), load_tensors(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    blobs = [path for path in (tmp_path / "cache").rglob("*") if ".incomplete" in path.name]
    assert not blobs


@pytest.mark.parametrize(
    ("command", "pattern"),
    [
        (["inspect", "MODEL"], "inspect runs in one process, and 2 were started together"),
        (["demo"], "demo runs in one process"),
        (["prune", "org/model", "--evict"], "--evict deletes shards once one process has read"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_ranks_cannot_do_together_is_refused(
    rank, command, pattern, monkeypatch, capsys, waits
):
    with rank_environments(2) as environments:
        for name, value in environments[rank].items():
            monkeypatch.setenv(name, value)
        more = ["--output", "x", "--keep", "4", "--calibration", "builtin"]
        assert main(command + more * (command[0] == "prune")) == 2
    assert bool(re.search(pattern, capsys.readouterr().err)) == (rank == 0)
    # Launchers end the others when the first has failed: the one that speaks must be the first.
    assert bool(waits) == (rank == 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_wrong_arguments_are_explained_once(rank, monkeypatch, capsys, waits):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        main(["prune", "model", "--no-such-option"])
    assert bool(capsys.readouterr().err) == (rank == 0)
    assert bool(waits) == (rank == 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_help_is_printed_once_and_nobody_waits(rank, monkeypatch, capsys, waits):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert bool(capsys.readouterr().out) == (rank == 0)
    assert not waits
