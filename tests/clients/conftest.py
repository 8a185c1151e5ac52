"""Pruned checkpoints and what is expected of them, made once a session; the figures at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from reap_stream.cli import main
from tests.clients.cases import Case
from tests.clients.checkpoints import VOCABULARY, write_source
from tests.clients.reference import Expected, Rows, expect
from tests.clients.running import Answer, ask

PROMPT_LENGTHS = (48, 40, 33, 17, 64)
# Tokens 0 and 1 end and begin texts.
FIRST_WORD = 2
_FIGURES = "largest difference"


@dataclass(frozen=True)
class Pruned:
    """A pruned checkpoint, and what it must answer to the prompts."""

    directory: Path
    expected: Expected


@pytest.fixture(scope="session")
def prompts() -> Rows:
    """Random tokens, enough to reach every expert."""
    rng = np.random.default_rng(1)
    return [rng.integers(FIRST_WORD, VOCABULARY, length) for length in PROMPT_LENGTHS]


@pytest.fixture(scope="session")
def pruned(prompts, tmp_path_factory) -> Callable[[Case], Pruned]:
    """Prunes a case by the command line; the same case gives the same directory."""
    made: dict[Case, Pruned] = {}
    calibration = tmp_path_factory.mktemp("calibration") / "rows.npy"
    np.save(calibration, np.random.default_rng(2).integers(FIRST_WORD, VOCABULARY, (16, 64)))

    def make(case: Case) -> Pruned:
        if case not in made:
            scratch = tmp_path_factory.mktemp(str(case))
            source, output = write_source(scratch / "source", case.source), scratch / "pruned"
            arguments = ["--output", str(output), "--keep", str(case.keep), "--mtp", case.mtp]
            arguments += ["--calibration", str(calibration), "--weights", case.weights]
            assert main(["prune", str(source), *arguments]) == 0
            by_hand = scratch / "by-hand"
            expected = expect(source, output, prompts, by_hand, case.weights)
            made[case] = Pruned(output, expected)
        return made[case]

    return make


@pytest.fixture
def answer_of(prompts, tmp_path) -> Callable[..., Answer]:
    """`ask` with the session's prompts."""

    def run(client: str, checkpoint: Path, *options: str) -> Answer:
        return ask(client, checkpoint, prompts, tmp_path, *options)

    return run


@pytest.fixture
def note(record_property) -> Callable[[str, Case, dict[str, float]], None]:
    """Keeps the largest differences of a comparison for the end of the session."""

    def keep(client: str, case: Case, largest: dict[str, float]) -> None:
        figures = ", ".join(f"{part} {value:.1e}" for part, value in largest.items())
        # Reports come from all workers; what a module holds does not.
        record_property(_FIGURES, f"{client:<10} {case!s:<44} {figures}")

    return keep


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints the figures."""
    reports = terminalreporter.getreports("passed")
    noted = [
        text for report in reports for name, text in report.user_properties if name == _FIGURES
    ]
    if noted:
        terminalreporter.section("largest difference of log-probabilities")
    for line in sorted(noted):
        terminalreporter.line(line)
