"""Uploads with huggingface_hub's own client, against a server on loopback that takes them."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess

import pytest
from huggingface_hub import HfApi

from reap_stream.cli import main
from reap_stream.upload.checksums import hash_files, read_checksums, write_checksums
from reap_stream.upload.files import LocalFile
from tests import upload_server
from tests.upload_server import NAME, Fault, remote

pruned, directory = upload_server.pruned, upload_server.directory
hub, upload = upload_server.hub, upload_server.upload


def relative_files(directory):
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def test_everything_arrives_and_is_read_back(hub, upload, directory):
    status, out, err = upload()
    assert status == 0, err
    assert hub.repositories[NAME].private
    files = remote(hub)
    assert set(files) == relative_files(directory)
    for name, content in files.items():
        data = (directory / name).read_bytes()
        stored = hub.stored[content[0]] if isinstance(content, tuple) else content
        assert stored == data
    assert len(list(directory.glob("*.safetensors"))) > 2
    sha = HfApi().model_info(NAME).sha
    assert f"commit {sha}" in out
    assert "README.md has no license" in err
    assert "README.md has no base_model" in err
    assert "--base-model" in err


def test_the_record_is_what_sha256sum_reads(upload, directory):
    assert upload()[0] == 0
    record = directory / "reap" / "SHA256SUMS"
    lines = [line.split("  ", 1) for line in record.read_text().splitlines()]
    listed = {name: value for value, name in lines}
    assert set(listed) == relative_files(directory) - {"README.md", "reap/SHA256SUMS"}
    for name, value in listed.items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == value
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--check", "--strict", "--quiet", "reap/SHA256SUMS"]
        subprocess.run(command, cwd=directory, check=True)


def test_options_reach_the_hub(hub, upload):
    status, out, _ = upload("--public", "--revision", "v2", "--commit-message", "for all")
    assert status == 0
    assert not hub.repositories[NAME].private
    assert (remote(hub), len(remote(hub, "v2")) > 5) == ({}, True)
    assert hub.messages == ["for all"]
    assert "/tree/v2" in out


def test_a_dry_run_lists_every_file_and_asks_nobody(hub, upload, directory):
    status, out, _ = upload("--dry-run")
    assert status == 0
    for name in relative_files(directory):
        assert f"{(directory / name).stat().st_size:,}  {name}" in out
    assert hub.requests == []
    assert not (directory / "reap" / "SHA256SUMS").exists()


def test_hidden_files_stay_here(hub, upload, directory):
    (directory / ".env").write_text("secret")
    (directory / ".cache").mkdir()
    (directory / ".cache" / "x").write_text("secret")
    assert upload()[0] == 0
    assert not [name for name in remote(hub) if name.startswith(".")]


def test_a_second_run_sends_no_weights_again(hub, upload):
    hub.faults.append(Fault("POST", "/commit/", 403))
    assert upload()[0] == 1
    sent = hub.asked("PUT")
    assert sent
    assert remote(hub) == {}
    assert upload()[0] == 0
    assert hub.asked("PUT") == sent
    assert remote(hub)


@pytest.mark.parametrize("part", ["/commit/", "/preupload/", "/batch"])
def test_a_connection_that_breaks_is_taken_up_again(part, hub, upload):
    hub.faults.append(Fault("POST", part))
    status, _, err = upload()
    assert status == 0, err


def shorter(entry):
    wrong = entry["rfilename"] == "config.json"
    return {**entry, "size": entry["size"] - 1} if wrong else entry


def other_shard(entry):
    if "lfs" not in entry:
        return entry
    return {**entry, "lfs": {**entry["lfs"], "sha256": "0" * 64}}


def other_blob(entry):
    return {**entry, "blobId": "0" * 40} if entry["rfilename"] == "reap/run.json" else entry


def hidden(entry):
    return None if entry["rfilename"] == "README.md" else entry


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (shorter, "config.json: .* bytes there"),
        (other_shard, "model-00001-of-.*safetensors: hash 0000"),
        (other_blob, "reap/run.json: hash 0000"),
        (hidden, "README.md: missing"),
    ],
)
def test_what_arrives_as_something_else_is_found(tamper, said, hub, upload):
    hub.tamper = tamper
    status, _, err = upload()
    assert status == 1
    assert re.search(said, err)


def test_files_changed_since_their_hashes_were_recorded(hub, upload, directory):
    assert upload()[0] == 0
    hub.requests.clear()
    shard = min(directory.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (directory / "generation_config.json").unlink()
    status, _, err = upload()
    assert status == 1
    assert f"{shard.name}: other bytes" in err
    assert "generation_config.json: missing" in err
    assert hub.asked("PUT") == hub.asked("POST") == []


def test_the_card_may_be_edited_and_a_file_added(hub, upload, directory):
    assert upload()[0] == 0
    with (directory / "README.md").open("a") as stream:
        stream.write("\nmore\n")
    (directory / "picture.svg").write_text("<svg/>")
    status, _, err = upload()
    assert status == 0, err
    assert remote(hub)["README.md"].endswith(b"\nmore\n")
    assert "picture.svg" in (directory / "reap" / "SHA256SUMS").read_text()


def test_the_record_follows_what_card_writes(hub, upload, directory):
    assert upload()[0] == 0
    assert main(["card", str(directory), "--base-model", "org/big"]) == 0
    status, _, err = upload()
    assert status == 0, err
    assert b"org/big" in remote(hub)["README.md"]
    assert b"org/big" in remote(hub)["reap/card.json"]


def test_names_that_the_record_must_escape(tmp_path):
    names = ["a\\b", "a\nb", "a\rb", "\\n", " a", "README.md", "reap/SHA256SUMS"]
    (tmp_path / "reap").mkdir()
    for name in names:
        (tmp_path / name).write_text(name)
    files = [LocalFile(n, tmp_path / n, (tmp_path / n).stat().st_size) for n in names]
    hashes = hash_files(files)
    write_checksums(tmp_path, hashes)
    assert read_checksums(tmp_path) == {name: hashes[name] for name in names[:-2]}
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--check", "--strict", "--quiet", "reap/SHA256SUMS"]
        subprocess.run(command, cwd=tmp_path, check=True)


def test_hashes_of_verified_files_are_held_against_them(hub, upload, directory, tiny):
    """What is altered between `verify` and the first upload is not sent."""
    words = ["verify", str(directory), "--source", str(tiny("glm4_moe")), "--checksums"]
    assert main(words) == 0
    recorded = read_checksums(directory)
    assert set(recorded) == relative_files(directory) - {"README.md", "reap/SHA256SUMS"}
    shard = min(directory.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    status, _, err = upload()
    assert status == 1
    assert f"{shard.name}: other bytes" in err
    assert hub.asked("POST") == []
    shard.write_bytes(whole)
    assert upload()[0] == 0
    assert read_checksums(directory) == recorded
