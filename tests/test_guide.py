"""docs/guide.md is true: its commands, run in their order, print what it shows."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from reap_stream.cli import build_parser, main
from tests.printed import differences

DOCS = Path(__file__).parents[1] / "docs"
GUIDE = DOCS / "guide.md"
# Commands, and the output that is shown right below them.
STEP = re.compile(r"```bash\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


def steps():
    """For each block of commands its lines, continued ones joined, and the output shown."""
    for script, shown in STEP.findall(GUIDE.read_text(encoding="utf-8")):
        yield script.replace("\\\n", " "), shown


def ours(script):
    return [line for line in script.splitlines() if line.startswith("reap-stream ")]


def run_here(lines):
    """What the command lines print, both streams together as a terminal shows them."""
    printed = io.StringIO()
    for line in lines:
        with redirect_stdout(printed), redirect_stderr(printed):
            assert main(shlex.split(line)[1:]) == 0, printed.getvalue()
    return printed.getvalue()


def run_in_a_shell(script):
    result = subprocess.run(
        ["bash", "-euc", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_python(page):
    """What the one Python block of a page prints."""
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(code, str(page), "exec"), {})
    return printed.getvalue()


def test_every_command_of_the_way_is_shown_with_its_output():
    commands = [(shlex.split(line)[1], shown) for script, shown in steps() for line in ours(script)]
    assert {name for name, _ in commands} == {
        "inspect", "plan", "prune", "verify", "eval", "compact", "report", "card", "upload"
    }  # fmt: skip
    assert all(shown for _, shown in commands)


def test_blocks_are_one_kind_of_command_each_and_are_accepted():
    for script, _ in steps():
        lines = ours(script)
        assert not lines or lines == script.strip().splitlines()
        for line in lines:
            assert callable(build_parser().parse_args(shlex.split(line)[1:]).run)


def test_the_time_of_a_large_model_follows_from_the_benchmark():
    (rate,) = re.findall(
        r"^\| tokens through a layer, per second \| (\d+) \|",
        (DOCS / "benchmarks.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    text = " ".join(GUIDE.read_text(encoding="utf-8").split())
    layers, hours = 93, 3600
    assert f"ran {rate} tokens a second" in text
    assert f"{layers * 128 * 2048 / int(rate) / hours:.0f} hours" in text
    assert round(layers * 512 * 2048 / int(rate) / hours / 24) == 3
    assert "about three days" in text


@pytest.mark.slow
def test_the_guide_from_its_first_command_to_its_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    faults = []
    for script, shown in steps():
        lines = ours(script)
        printed = run_here(lines) if lines else run_in_a_shell(script)
        missing = differences(shown, printed) if shown else []
        if missing:
            faults += [f"$ {script}", "shown, not printed:", *missing, "printed:", printed]
    assert not faults, "\n".join(faults)
    assert "def area" in run_python(DOCS / "serving.md")
