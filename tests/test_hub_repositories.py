"""Repositories of every shape, and every way to the Hub that the environment may name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from reap_stream.cli import main
from tests.hub_checkpoints import (
    assert_same_weights,
    by_layer,
    cached_shards,
    prune,
    reshard,
    shards,
)
from tests.hub_server import TOKEN, Fault, serving
from tests.model_hub_client import environment, point_at, without_waits

NAME = "org/shaped-moe"
# Without torch, whose import takes seconds.
OPEN = f"""
from reap_stream.checkpoint.providers import local_files
from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.hub.names import HubName
from reap_stream.hub.opening import Need, opened_hub_model
with opened_hub_model(HubName("{NAME}", None), Need.HEADERS) as directory:
    checkpoint = open_checkpoint(directory)
    print(sorted(checkpoint.tensors), [path.stat().st_size for path in local_files(checkpoint.shards)])
"""
EVICT = pytest.mark.parametrize("evict", [[], ["--evict"]], ids=["cache", "evict"])


@pytest.fixture(scope="module")
def source(tiny):
    return tiny("glm4_moe", num_nextn_predict_layers=0)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving() as server:
        point_at(monkeypatch, server.url, tmp_path / "cache")
        yield server


def copied(source, directory):
    """The same files, to which others may be added."""
    directory.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (directory / path.name).symlink_to(path)
    return directory


@EVICT
def test_shards_in_folders(hub, source, calibration, tmp_path, evict):
    many = reshard(source, tmp_path / "many", lambda name: f"weights/{by_layer(name)}")
    hub.add(NAME, many)
    assert prune(many, tmp_path / "expected", calibration) == 0
    assert prune(NAME, tmp_path / "out", calibration, *evict) == 0
    assert_same_weights(tmp_path / "out", tmp_path / "expected")
    assert main(["verify", str(tmp_path / "out"), "--source", NAME, *evict]) == 0
    assert len(cached_shards(tmp_path / "cache")) == (0 if evict else 4)


@EVICT
def test_of_several_sets_of_weights_one_is_fetched(hub, source, calibration, tmp_path, evict):
    """The one that the index names: not another precision, nor another library's, nor pickles."""
    many = reshard(source, tmp_path / "many", by_layer)
    others = [
        "consolidated.safetensors",
        "model.fp32-00001-of-00001.safetensors",
        "model.safetensors",
        "original/consolidated-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "model.gguf",
    ]
    for other in others:
        (many / other).parent.mkdir(exist_ok=True)
        (many / other).write_bytes(b"not fetched")
    (many / "model.fp32.safetensors.index.json").write_text('{"weight_map": {}}', encoding="utf-8")
    hub.add(NAME, many)
    assert prune(many, tmp_path / "expected", calibration) == 0
    assert prune(NAME, tmp_path / "out", calibration, *evict) == 0
    assert_same_weights(tmp_path / "out", tmp_path / "expected")
    for other in others:
        assert not hub.asked("GET", other)
        assert not (tmp_path / "out" / other).exists()


@EVICT
def test_small_shards_that_git_keeps(hub, source, calibration, tmp_path, from_directory, evict):
    """Their hashes are git's, and they come without a redirection."""
    hub.add(NAME, source, large=lambda _: False)
    assert prune(NAME, tmp_path / "out", calibration, *evict) == 0
    assert_same_weights(tmp_path / "out", from_directory)
    hub.faults.append(Fault("model.safetensors", "altered", after=150_000, times=9))
    assert prune(NAME, tmp_path / "again", calibration, "--evict") == (1 if evict else 0)


def test_weights_that_are_pickled_alone(hub, source, calibration, tmp_path, capsys):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (pickled / path.name).symlink_to(path)
    (pickled / "pytorch_model.bin").write_bytes(b"not fetched")
    hub.add(NAME, pickled)
    assert prune(NAME, tmp_path / "out", calibration) == 2
    said = capsys.readouterr().err
    assert "only pickled weights (['pytorch_model.bin'])" in said
    assert "convert them to safetensors first" in said
    assert not hub.asked("GET", ".bin")


def test_an_endpoint_with_a_path(source, tmp_path, monkeypatch, calibration, from_directory):
    with serving(prefix="/mirror/hub") as hub:
        hub.add(NAME, source)
        point_at(monkeypatch, hub.url, tmp_path / "cache")
        assert prune(NAME, tmp_path / "out", calibration, "--evict") == 0
        assert {r.path.split("/")[1] for r in hub.requests} == {"mirror", "large"}
    assert_same_weights(tmp_path / "out", from_directory)


def test_the_environment_is_honoured(source, tmp_path):
    """`HF_ENDPOINT` with a slash at its end, `HF_TOKEN`, and then `HF_HUB_OFFLINE`."""
    with serving(prefix="/mirror") as hub:
        hub.add(NAME, source, private=True)
        variables = environment(f"{hub.url}/", tmp_path / "cache", HF_TOKEN=TOKEN, PATH="")
        online = open_in_a_process(variables)
        assert online.returncode == 0, online.stderr
        assert any(request.has_token for request in hub.requests)
        places = ("/mirror/api/", "/mirror/org/", "/large/")
        assert all(request.path.startswith(places) for request in hub.requests)
    assert "model.embed_tokens.weight" in online.stdout
    assert TOKEN not in online.stdout + online.stderr
    # The server is gone.
    offline = open_in_a_process({**variables, "HF_HUB_OFFLINE": "1"})
    assert (offline.returncode, offline.stdout) == (0, online.stdout), offline.stderr


def open_in_a_process(variables):
    """The library reads its environment when it is imported."""
    line = [sys.executable, "-c", OPEN]
    return subprocess.run(line, env=variables, capture_output=True, text=True, check=False)


def test_a_proxy_is_asked(source, tmp_path, monkeypatch, calibration, from_directory):
    """A server that answers for a host that there is not."""
    with serving() as hub:
        hub.add(NAME, source)
        point_at(monkeypatch, "http://hub.invalid", tmp_path / "cache")
        monkeypatch.setenv("HTTP_PROXY", hub.urls[0])
        monkeypatch.setattr(hub, "urls", [hub.urls[0], "http://storage.invalid"])
        assert prune(NAME, tmp_path / "out", calibration, "--evict") == 0
    assert_same_weights(tmp_path / "out", from_directory)


@pytest.fixture
def signed(monkeypatch):
    """Sends large files by an address that opens the storage to everybody."""
    from tests import hub_server

    send = hub_server._Handler.send

    def sign(handler, status, body, headers, fault=None):
        if "Location" in headers:
            headers = {**headers, "Location": f"{headers['Location']}?Signature=opensesame"}
        send(handler, status, body, headers, fault)

    monkeypatch.setattr(hub_server._Handler, "send", sign)


@pytest.mark.parametrize("status", [200, 403, 401, 500])
def test_no_secret_is_written_anywhere(
    hub, source, calibration, tmp_path, monkeypatch, capfd, signed, status
):
    """Not in what is printed, nor in a record, a journal, a card or a job that failed."""
    hub.add(NAME, source, gated=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    without_waits(monkeypatch)
    if status != 200:
        # The header comes, the shard does not.
        passes = Fault("model.safetensors", "slow", seconds=0)
        hub.faults += [passes, Fault("model.safetensors", "status", status=status, times=99)]
    assert prune(NAME, tmp_path / "out", calibration, "--evict") == (0 if status == 200 else 1)
    printed = capfd.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    written = b"".join(path.read_bytes() for path in files)
    for secret in (TOKEN, "opensesame"):
        assert secret not in printed.out + printed.err
        assert secret.encode() not in written
    assert any(request.has_token for request in hub.requests)
    assert shards(source)
