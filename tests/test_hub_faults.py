"""A Hub that misbehaves: what passes is tried again, what does not is said with its remedy."""

from __future__ import annotations

import pytest
from huggingface_hub import constants

from reap_stream.checkpoint.providers import provider_of
from reap_stream.cli import main
from reap_stream.errors import CheckpointError, ReadError
from reap_stream.hub.errors import explained
from reap_stream.hub.names import HubName
from reap_stream.hub.opening import Need, opened_hub_model
from tests.hub_server import TOKEN, Fault, serving
from tests.model_hub_client import point_at, without_waits

NAME = "org/faulty-moe"
SHARD = "model.safetensors"
PLACES = pytest.mark.parametrize("evict", [False, True], ids=["cache", "work"])


@pytest.fixture(scope="module")
def source(tiny):
    return tiny("glm4_moe", num_nextn_predict_layers=0)


@pytest.fixture
def hub(hub, monkeypatch):
    without_waits(monkeypatch)
    return hub


@pytest.fixture
def fetch(tmp_path):
    """Fetches the shard, and gives its bytes."""

    def call(evict):
        work = tmp_path / "work" if evict else None
        with opened_hub_model(HubName(NAME, None), Need.SIDE_FILES, work=work) as directory:
            return provider_of(directory).ensure([SHARD])[0].read_bytes()

    return call


@PLACES
@pytest.mark.parametrize(
    "fault",
    [
        Fault(SHARD, "slow", seconds=0.005),
        Fault(SHARD, "cut", after=40_000),
        Fault(SHARD, "cut", after=40_000, times=3),
        Fault(SHARD, "cut", after=0, times=2),
        Fault(SHARD, "short", after=40_000),
        Fault(SHARD, "altered", after=40_000),
        Fault(SHARD, "status", status=500, times=2),
        Fault(SHARD, "status", status=503, times=2),
        Fault(SHARD, "status", status=429, headers={"Retry-After": "1"}, times=2),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status or fault.after}-{fault.times}",
)
def test_what_passes_is_tried_again(hub, source, fetch, fault, evict):
    hub.faults.append(fault)
    assert fetch(evict) == (source / SHARD).read_bytes()
    assert fault.times == 0


@PLACES
def test_a_server_that_says_nothing_more_is_asked_again(hub, source, fetch, monkeypatch, evict):
    """Behind the first bytes nothing comes for longer than the library waits."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.4)
    fault = Fault(SHARD, "slow", seconds=1.5)
    hub.faults.append(fault)
    assert fetch(evict) == (source / SHARD).read_bytes()
    assert fault.times == 0
    assert len([r for r in hub.asked("GET", SHARD) if r.status != 302]) >= 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_listing_is_asked_for_again(hub, fetch, source, status):
    hub.faults.append(Fault("api", "status", status=status, times=2))
    assert fetch(evict=False) == (source / SHARD).read_bytes()


@PLACES
def test_a_cut_transfer_goes_on_where_it_stopped(hub, source, fetch, evict):
    hub.faults.append(Fault(SHARD, "cut", after=40_000))
    fetch(evict)
    ranges = [request.range for request in hub.asked("GET", SHARD) if request.status != 302]
    assert ranges[0] is None
    start = int(ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= 40_000
    assert len(ranges) == 2


def test_a_transfer_is_resumed_by_the_next_run(hub, source, fetch, tmp_path):
    hub.faults += [
        Fault(SHARD, "cut", after=40_000),
        Fault(SHARD, "status", status=403, times=99),
    ]
    with pytest.raises(ReadError, match="access is refused"):
        fetch(evict=True)
    (partial,) = (tmp_path / "work").rglob("*.partial")
    done = partial.stat().st_size
    assert 0 < done <= 40_000
    hub.faults.clear()
    hub.forget()
    assert fetch(evict=True) == (source / SHARD).read_bytes()
    assert f"bytes={done}-" in [request.range for request in hub.asked("GET", SHARD)]
    assert not (tmp_path / "work").exists()


@PLACES
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(SHARD, "status", status=403, times=99), "access is refused: check the token's"),
        (Fault(SHARD, "altered", after=9, times=99), "fetched, twice, is not what the Hub lists"),
        (Fault(SHARD, "status", status=429, times=99), "the Hub asks to slow down"),
        (Fault(SHARD, "status", status=500, times=99), "try again"),
        (Fault(SHARD, "cut", times=99), "the connection did not hold: try again"),
    ],
    ids=["403", "altered", "429", "500", "cut"],
)
def test_what_does_not_pass_is_said(hub, fetch, fault, message, evict):
    hub.faults.append(fault)
    with pytest.raises(ReadError, match=message) as raised:
        fetch(evict)
    assert NAME in str(raised.value)
    assert SHARD in str(raised.value)
    # What was altered is not left where a later run would take it for whole.
    assert not [request for request in hub.requests if request.has_token]


@PLACES
@pytest.mark.parametrize(
    ("code", "repository", "hint"),
    [
        ({"gated": True}, "config.json", "it is gated: accept its conditions on http"),
        ({"private": True}, NAME, "for a private one: hf auth login"),
    ],
    ids=["gated", "private"],
)
def test_access_must_be_had(hub, source, fetch, code, repository, hint, evict, monkeypatch):
    hub.add(NAME, source, **code)
    with pytest.raises(CheckpointError, match=hint) as raised:
        fetch(evict)
    # The library's own words stand beside ours.
    assert "401 Client Error" in str(raised.value)
    assert repository in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch(evict) == (source / SHARD).read_bytes()
    # Large files lie with another host, which is shown no token.
    assert {request.has_token for request in hub.requests if "/large/" in request.path} == {False}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("org/nothing", "there is no such model; for a private one: hf auth login"),
        (f"{NAME}@no-such-branch", "no such revision"),
        ("org/a--b", "ids there are not spelt so"),
    ],
)
def test_a_model_that_is_not_there(hub, capsys, name, hint):
    """It may be a path that is misspelt, and `inspect` has nothing to resume."""
    assert main(["inspect", name]) == 2
    said = capsys.readouterr().err
    assert f"reap-stream: there is no path {name} here; asked the Hub: " in said
    assert hint in said
    assert "--resume" not in said


def test_a_server_that_is_away(monkeypatch, tmp_path, capsys):
    with serving() as server:
        url = server.url
    point_at(monkeypatch, url, tmp_path)
    without_waits(monkeypatch)
    assert main(["inspect", NAME]) == 2
    assert "the Hub was not reached: see to the network" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fault",
    [
        Fault(SHARD, "status", status=503, times=2),
        Fault(SHARD, "status", status=429, times=1),
        Fault(SHARD, "cut", after=100, times=2),
        Fault(SHARD, "slow", seconds=0.005),
    ],
    ids=["503", "429", "cut", "slow"],
)
def test_headers_are_asked_for_again(hub, fault, capsys):
    hub.faults.append(fault)
    assert main(["inspect", NAME]) == 0
    assert fault.times == 0


def test_a_header_that_is_cut_short(hub, capsys):
    hub.faults.append(Fault(SHARD, "short", after=100, times=99))
    assert main(["inspect", NAME]) == 2
    assert "bytes came" in capsys.readouterr().err


def test_a_shard_of_another_length_than_listed(hub, monkeypatch, capsys):
    def longer(path):
        return path.stat().st_size + path.name.endswith("safetensors")

    monkeypatch.setattr("tests.hub_server.listed_nbytes", longer)
    assert main(["inspect", NAME]) == 2
    assert "the repository lists" in capsys.readouterr().err


def test_a_shard_that_the_repository_lacks(hub, tmp_path, tiny, capsys):
    directory = tiny("glm4_moe", max_shard_size="40KB")
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    for path in directory.iterdir():
        (lacking / path.name).symlink_to(path)
    min(lacking.glob("*.safetensors")).unlink()
    hub.add("org/lacking", lacking)
    assert main(["inspect", "org/lacking"]) == 2
    assert "which its index names: the repository is not whole" in capsys.readouterr().err


def test_a_repository_without_a_config(hub, tmp_path, capsys):
    directory = tmp_path / "gguf"
    directory.mkdir()
    (directory / "model.gguf").write_bytes(b"GGUF")
    hub.add("org/gguf", directory)
    assert main(["inspect", "org/gguf"]) == 2
    assert "give the model it was made of" in capsys.readouterr().err


def test_a_damaged_cache_is_not_used(hub, fetch, tmp_path):
    fetch(evict=False)
    (cached,) = (tmp_path / "cache").rglob(f"snapshots/*/{SHARD}")
    cached.resolve().write_bytes(b"cut")
    with pytest.raises(ReadError, match="the cache's copy is damaged; delete it"):
        fetch(evict=False)


def test_a_work_directory_has_one_user(hub, fetch, tmp_path):
    name = HubName(NAME, None)
    work = tmp_path / "work"
    with (
        opened_hub_model(name, Need.HEADERS, work=work),
        pytest.raises(Exception, match="is working on this output"),
    ):
        fetch(evict=True)
    assert not work.exists()


def test_a_model_given_twice(hub):
    name = HubName(NAME, None)
    with (
        opened_hub_model(name, Need.HEADERS),
        pytest.raises(Exception, match="give each model once"),
        opened_hub_model(name, Need.HEADERS),
    ):
        pass


def test_a_cache_at_another_commit_is_used(hub, source, fetch, tmp_path):
    """The same bytes under another commit are not fetched again, and not deleted."""
    fetch(evict=False)
    newer = tmp_path / "newer"
    newer.mkdir()
    for path in source.iterdir():
        (newer / path.name).symlink_to(path)
    (newer / "README.md").write_text("changed", encoding="utf-8")
    hub.add(NAME, newer)
    hub.forget()
    assert fetch(evict=True) == (source / SHARD).read_bytes()
    assert not hub.asked("GET", SHARD)
    assert list((tmp_path / "cache").rglob(f"snapshots/*/{SHARD}"))


def test_what_an_error_says_opens_nothing():
    said = f"401 with {TOKEN} for https://storage.test/x?X-Amz-Signature=abc&more=1"
    with (
        pytest.raises(CheckpointError, match=r"storage\.test/x\?…") as caught,
        explained("org/m", "fetching x"),
    ):
        raise OSError(said)
    assert TOKEN not in str(caught.value)
    assert "abc" not in str(caught.value)
