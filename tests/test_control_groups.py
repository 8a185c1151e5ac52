"""Limits of control groups, on files as the kernel shows them."""

from __future__ import annotations

import pytest

from reap_stream import resident
from reap_stream.control_groups import free_in_groups

MIB = 2**20


@pytest.fixture
def group(tmp_path):
    """Makes a group's files; None: it has no limit."""

    def make(name, limit, held=0, inactive=0, active=0):
        directory = tmp_path / "cgroup" / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.max").write_text("max\n" if limit is None else f"{limit * MIB}\n")
        (directory / "memory.current").write_text(f"{held * MIB}\n")
        stat = {"anon": 7, "file": 99, "shmem": 5, "inactive_file": inactive, "active_file": active}
        lines = (f"{key} {value * MIB}" for key, value in stat.items())
        (directory / "memory.stat").write_text("\n".join(lines) + "\n")

    return make


def free(tmp_path, own="0::/\n"):
    (tmp_path / "own").write_text(own)
    found = free_in_groups(tmp_path / "cgroup", tmp_path / "own")
    return None if found is None else found / MIB


def test_what_others_hold_is_taken_off_and_the_files_cache_is_not(group, tmp_path):
    group("", 1000, held=600, inactive=100, active=50)
    assert free(tmp_path) == 550
    # A cache counted twice, or a limit lowered beneath what is held.
    group("", 1000, held=100, inactive=300)
    assert free(tmp_path) == 1000
    group("", 50, held=100)
    assert free(tmp_path) == 0


def test_the_tightest_group_on_the_way_counts(group, tmp_path):
    group("", None)
    group("a.slice", 800, held=100)
    group("a.slice/b.service", 900, held=50)
    group("other", 1)
    own = "1:memory:/other\n0::/a.slice/b.service\n"
    assert free(tmp_path, own) == 700
    group("a.slice/b.service", 300, held=50)
    assert free(tmp_path, own) == 250
    assert free(tmp_path, "0::/a.slice\n") == 700


@pytest.mark.parametrize("own", ["0::/\n", "0::/../outside\n", "0::/gone\n", "", "5:cpu:/x\n"])
def test_no_limit_is_no_limit(own, group, tmp_path):
    assert free(tmp_path, own) is None
    group("", None)
    assert free(tmp_path, own) is None


def test_files_that_cannot_be_read_limit_nothing(group, tmp_path):
    group("", 10)
    (tmp_path / "cgroup" / "memory.stat").write_text("no numbers here\n")
    assert free(tmp_path) is None
    assert free_in_groups(tmp_path / "none", tmp_path / "none") is None


def test_the_budget_keeps_to_it(monkeypatch):
    monkeypatch.setattr(resident, "resident_nbytes", lambda: 0)
    monkeypatch.setattr(resident, "free_in_groups", lambda: 100 * MIB)
    assert resident.available_nbytes() == int(100 * MIB * resident.USABLE_SHARE)
    assert resident.available_nbytes(4) == int(100 * MIB * resident.USABLE_SHARE) // 4
    monkeypatch.setattr(resident, "free_in_groups", lambda: None)
    assert resident.available_nbytes() > 100 * MIB
