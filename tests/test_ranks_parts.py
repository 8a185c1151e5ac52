"""How ranks are launched, meet, agree and add up, each by itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from reap_stream.errors import UsageError
from reap_stream.ranks.agreement import check_same
from reap_stream.ranks.base import ALONE, say_of
from reap_stream.ranks.group import RankGroup
from reap_stream.ranks.launch import Place, launched_place, open_ranks
from reap_stream.ranks.peers import Peer, gone_peers, on_machines
from reap_stream.ranks.sums import sum_over_ranks
from reap_stream.scoring.saliency import LayerStats
from tests.rank_threads import together
from tests.source_messages import is_printed

MEETING = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        # A cluster's scheduler that says how many processes there are, but not which this is.
        {"WORLD_SIZE": "4"},
        {"RANK": "0"},
    ],
)
def test_a_process_alone_is_alone(environment):
    assert launched_place(environment) == Place()
    with open_ranks(Place()) as ranks:
        assert ranks is ALONE


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (MEETING, Place(1, 4)),
        ({**MEETING, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Place(1, 4, 1, 2)),
        ({**MEETING, "LOCAL_RANK": "1"}, Place(1, 4, 1)),
    ],
)
def test_a_launcher_says_which_rank_this_is(environment, place):
    assert launched_place(environment) == place


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"RANK": "4"}, "names rank 4 of 4"),
        ({"RANK": "one"}, "RANK is 'one' in the environment"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "on its machine 2 of 2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR not set: start with torchrun"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "MASTER_ADDR and MASTER_PORT not set"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(changes, pattern):
    with pytest.raises(UsageError, match=pattern):
        launched_place({**MEETING, **changes})


@pytest.mark.parametrize("patience", [0.0, -1.0, float("nan")])
def test_a_patience_that_is_none_is_refused(patience):
    with pytest.raises(UsageError, match="--rank-patience"), open_ranks(Place(0, 2), patience):
        pass


def test_launching_imports_no_torch():
    code = (
        "import sys; from reap_stream.ranks.launch import launched_place; launched_place(); "
        "import reap_stream.shared_job; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_alone_every_exchange_gives_what_was_given():
    assert ALONE.share({"a": [1, 2.5, None]}) == [{"a": [1, 2.5, None]}]
    assert ALONE.by_first(lambda: "done") == "done"
    assert ALONE.leads
    assert ALONE.on_this_machine == 1


def test_all_get_what_each_gives_and_what_the_first_did():
    taken = []

    def call(ranks):
        def step():
            taken.append(ranks.rank)
            return {"by": ranks.rank}

        return ranks.share(ranks.rank * 2), ranks.by_first(step), ranks.first([ranks.rank])

    assert together(3, call) == [([0, 2, 4], {"by": 0}, [0])] * 3
    assert taken == [0]


def some_stats(seed, tokens):
    rng = np.random.default_rng(seed)
    stats = LayerStats.zeros(2, 5)
    for name, array in stats.arrays().items():
        array[:] = tokens if name.endswith("tokens") else rng.normal(size=(2, 5)) ** 2 * 1e3
    stats.odd.tokens[:] = tokens // 2
    return stats


@pytest.mark.parametrize("size", [1, 2, 5])
def test_sums_of_all_ranks_are_the_same_bits_on_each(size):
    def call(ranks):
        return sum_over_ranks(ranks, some_stats(ranks.rank, ranks.rank), 10 + ranks.rank)

    found = together(size, call)
    for stats, lost in found:
        assert lost == sum(range(10, 10 + size))
        for name, array in stats.arrays().items():
            each = [some_stats(rank, rank).arrays()[name] for rank in range(size)]
            combine = np.max if name in {"norm_max", "output_max"} else np.sum
            np.testing.assert_allclose(array, combine(each, axis=0), rtol=1e-14, err_msg=name)
            np.testing.assert_array_equal(array, found[0][0].arrays()[name])


def test_what_differs_is_named_with_both_values():
    def call(ranks):
        facts = {"seed": 3, "data": "one" if ranks.rank < 2 else "two"}
        with pytest.raises(UsageError) as caught:
            check_same(ranks, facts)
        return str(caught.value)

    messages = set(together(3, call))
    assert len(messages) == 1
    assert 'data is "two" on rank 2 and "one" on rank 0' in messages.pop()
    together(3, lambda ranks: check_same(ranks, {"seed": 3, "list": (1, 2)}))


@pytest.mark.parametrize(
    ("place", "local"),
    [(Place(2, 4), (1, 2)), (Place(2, 4, 0, 1), (0, 1)), (Place(3, 4, 3), (3, 2))],
)
def test_what_the_launcher_says_of_a_machine_goes_before(place, local):
    group = RankGroup(place, timedelta(minutes=1))
    group._settle([Peer(host, 0) for host in "baab"])
    assert group.machines == ((0, 3), (1, 2))
    assert (group.local_rank, group.local_size) == local


def test_ranks_are_put_on_their_machines():
    peers = [Peer(host, number) for number, host in enumerate(("a", "b", "a", "c", "b"))]
    assert on_machines(peers) == ((0, 2), (1, 4), (3,))


def test_machines_of_one_name_are_told_apart():
    """Else they would write to one shard, and on a network file system undo each other's bytes."""
    here = Peer.here()
    other = here._replace(boot="another start of another system")
    assert on_machines([here, other, here]) == ((0, 2), (1,))
    assert here.boot
    # Its process id says nothing here.
    assert gone_peers([here, other._replace(process=2**22 + 1)], 0, 0.0) == []


def test_a_process_that_ended_is_found_among_others():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    here = Peer.here()
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        # Not waited for: it stays as its exit status alone, as under a launcher.
        peers = [here, here._replace(process=living.pid), here._replace(process=ended.pid)]
        assert gone_peers(peers, 0, 20.0) == [2]
        ended.wait()
        assert gone_peers(peers, 0, 20.0) == [2]
        elsewhere = [here, Peer("another-machine", ended.pid), here._replace(process=living.pid)]
        assert gone_peers(elsewhere, 0, 0.0) == []
    finally:
        living.communicate(b"\n")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "the machine is out of memory: give --memory less"),
        (
            torch.OutOfMemoryError("of 80 GiB"),
            "smaller --batch-tokens, or --device cpu (of 80 GiB)",
        ),
        (KeyError("name"), "KeyError: 'name'"),
    ],
)
def test_the_others_are_told_what_to_do(error, text, monkeypatch):
    group, told = RankGroup(Place(1, 2), timedelta(minutes=1)), []
    monkeypatch.setattr(group, "_round", lambda message, **_: told.append(json.loads(message)))
    monkeypatch.setattr(group, "_leave", lambda: None)
    assert group._tell(error)
    assert text in told[0]["text"]
    assert told[0]["resumable"]


def test_messages_are_json_that_keeps_numbers():
    assert together(2, lambda ranks: ranks.share(0.1 + ranks.rank))[0] == [0.1, 1.1]


def test_the_page_quotes_what_is_printed():
    page = (Path(__file__).parents[1] / "docs" / "ranks.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 5
    assert [text for text in quoted if not is_printed(text)] == []


@pytest.mark.parametrize(
    ("values", "text"), [([], ""), ([1], "1"), ([1, 2], "1 and 2"), ([1, 2, 3], "1, 2 and 3")]
)
def test_lists_are_said_as_people_do(values, text):
    assert say_of(values) == text
