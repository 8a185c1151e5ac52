"""MODEL from the Hub, against a server on loopback: what is fetched, when, and what stays."""

from __future__ import annotations

import json

import pytest

from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.cli import main
from reap_stream.hub.names import parse_hub_name
from tests.hub_checkpoints import (
    assert_same_weights,
    cached_shards,
    opened,
    prune,
    seven_shards,
    shards,
)
from tests.hub_server import TOKEN

NAME = "org/tiny-moe"


@pytest.fixture(scope="module")
def source(tiny):
    return seven_shards(tiny)


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("zai-org/GLM-4.6-FP8@refs/pr/3", "zai-org/GLM-4.6-FP8", "refs/pr/3"),
    ],
)
def test_ids_of_the_hub(text, repository, revision):
    name = parse_hub_name(text)
    assert (name.repository, name.revision, str(name)) == (repository, revision, text)


@pytest.mark.parametrize(
    "text", ["name", "./org/name", "/org/name", "a/b/c", "org/", "../x", "org/name@", "org /name"]
)
def test_paths_are_no_ids(text):
    assert parse_hub_name(text) is None


def test_a_path_that_exists_wins(hub, source, monkeypatch, tmp_path, capsys):
    (tmp_path / "org").mkdir()
    (tmp_path / NAME).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", NAME]) == 0
    assert not hub.requests


def test_inspect_reads_headers_alone(hub, source, capsys, tmp_path):
    assert main(["inspect", NAME, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(source), "--json"]) == 0
    assert found == json.loads(capsys.readouterr().out)
    assert not cached_shards(tmp_path / "cache")
    headers = sum(int.from_bytes(path.read_bytes()[:8], "little") for path in shards(source))
    assert hub.sent("safetensors") <= headers + 100_000 * len(shards(source))
    assert all(request.range for request in hub.asked("GET", "safetensors"))
    assert not hub.asked("GET", "README.md")


def test_a_header_longer_than_the_first_request(hub, source, capsys, monkeypatch):
    monkeypatch.setattr("reap_stream.hub.starts._FIRST_NBYTES", 50)
    assert main(["inspect", NAME]) == 0
    assert hub.sent("safetensors") < 50_000


def test_plan_tells_what_is_fetched(hub, source, capsys):
    assert main(["plan", NAME, "--keep", "4", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    total = sum(path.stat().st_size for path in shards(source))
    assert planned["download"]["bytes"] == total
    assert 0 < planned["download"]["evicted_peak_bytes"] < total
    assert not planned["facts" if "facts" in planned else "estimated"]
    assert main(["plan", NAME, "--keep", "4"]) == 0
    peak, written = planned["download"]["evicted_peak_bytes"], planned["disk_bytes"]
    said = capsys.readouterr().out
    assert f"with --evict at most {peak / 1e6:.2f} MB of them" in said
    assert f"at a time, {(peak + written) / 1e9:.2f} GB with the output" in said
    assert main(["plan", str(source), "--keep", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["download"] is None


def test_prune_gives_what_the_directory_gives(hub, source, calibration, from_directory, tmp_path):
    output = tmp_path / "out"
    assert prune(NAME, output, calibration) == 0
    assert_same_weights(output, from_directory)
    total = sum(path.stat().st_size for path in shards(source))
    assert len(cached_shards(tmp_path / "cache")) == len(shards(source))
    # Each shard once, and its header before.
    assert hub.sent("safetensors") <= total + 100_000 * len(shards(source))
    assert not hub.asked("GET", "weights.pth")
    record = json.loads((output / "reap" / "run.json").read_text(encoding="utf-8"))
    assert record["source"]["repository"] == NAME
    assert record["source"]["revision"] == hub.commit
    assert record["settings"]["model"] == f"{NAME}@{hub.commit}"
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"\nbase_model: {NAME}\n" in card
    assert card.count("# the source") == 1
    assert main(["verify", str(output), "--source", NAME]) == 0


def test_a_cache_is_used_and_works_offline(
    hub, source, calibration, from_directory, tmp_path, monkeypatch
):
    assert prune(NAME, tmp_path / "first", calibration) == 0
    hub.forget()
    assert prune(NAME, tmp_path / "second", calibration, "--evict") == 0
    assert hub.sent("safetensors") == 0
    assert len(cached_shards(tmp_path / "cache")) == len(shards(source))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.forget()
    assert prune(NAME, tmp_path / "third", calibration) == 0
    assert not hub.requests
    assert_same_weights(tmp_path / "third", from_directory)
    records = [
        json.loads((tmp_path / name / "reap" / "run.json").read_text(encoding="utf-8"))
        for name in ("first", "second", "third")
    ]
    assert len({record["source"]["fingerprint"] for record in records}) == 1


def test_offline_without_a_cache(hub, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["inspect", NAME]) == 2
    assert "offline mode is on (HF_HUB_OFFLINE)" in capsys.readouterr().err
    assert not hub.requests


def test_offline_with_shards_missing(hub, monkeypatch, capsys, calibration, tmp_path):
    assert main(["inspect", NAME]) == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert prune(NAME, tmp_path / "out", calibration) != 0
    assert "unset HF_HUB_OFFLINE" in capsys.readouterr().err


def test_identity_of_a_hub_model_needs_no_weights(hub, source, tmp_path):
    """The same commit has one fingerprint, another commit's bytes another."""
    with opened(NAME) as directory:
        first = open_checkpoint(directory)
    assert str(first.origin) == f"{NAME}@{hub.commit}"
    assert [ref.shape for ref in first.tensors.values()] == [
        ref.shape for ref in open_checkpoint(source).tensors.values()
    ]
    assert first.side_files == open_checkpoint(source).side_files
    assert first.skipped_files == open_checkpoint(source).skipped_files
    assert TOKEN not in str(first)
