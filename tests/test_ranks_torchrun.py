"""The real launcher: what it starts together works together, and what it ends can be resumed."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.killing import run
from tests.rank_results import decided
from tests.resuming import prune_arguments

SECONDS = 120


def torchrun(size, *arguments):
    """Runs a module in several ranks; its status and all that is printed."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_killed_rank_ends_the_job_and_can_be_resumed(tiny, calibration, tmp_path):
    source, log = tiny("glm4_moe"), tmp_path / "log"
    whole, output = tmp_path / "whole", tmp_path / "output"
    options = ("--snapshot-minutes", "0")
    assert run(prune_arguments(source, whole, calibration, *options), log) == 0, log.read_text()
    arguments = prune_arguments(source, output, calibration, *options)
    status, text = torchrun(2, "tests.rank_main", "1", "20", *arguments)
    assert status == 1, text
    told = re.findall("^reap-stream: .*", text, re.MULTILINE)
    assert len(told) == 1, text
    assert re.search(r"rank 1 \(process \d+ on .*\) is gone", told[0]), text
    assert told[0].endswith("The same command with --resume goes on."), text
    assert not output.exists()
    status, text = torchrun(2, "reap_stream", *arguments, "--resume")
    assert status == 0, text
    assert "in the largest of 2 ranks" in text
    assert decided(output) == decided(whole)
