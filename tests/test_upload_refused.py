"""Uploads that must not happen: repositories, tokens and directories that are not right."""

from __future__ import annotations

import json
import shutil

import pytest

from reap_stream.cli import main
from tests import upload_server
from tests.upload_server import NAME, Fault, Repository, remote

pruned, directory = upload_server.pruned, upload_server.directory
hub, upload = upload_server.hub, upload_server.upload


@pytest.mark.parametrize(
    ("method", "part", "status", "code", "said"),
    [
        ("GET", "whoami", 401, 2, "hf auth login"),
        ("POST", "/repos/create", 403, 1, "may not write"),
        ("POST", "/repos/create", 402, 1, "storage-limits"),
        ("POST", "/preupload/", 403, 1, "may not write"),
        ("POST", "/commit/", 412, 1, "run the same command again"),
    ],
)
def test_refusals_say_what_to_do(method, part, status, code, said, hub, upload):
    hub.faults.append(Fault(method, part, status, times=9))
    found, _, err = upload()
    assert found == code
    assert said in err
    assert NAME in err


def test_without_a_token_nothing_is_sent(hub, upload, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    status, _, err = upload()
    assert status == 2
    assert "hf auth login" in err
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("other/model", "may write to me, lab:"),
        ("ro/model", "may only read in ro"),
        ("model", "NAMESPACE/model"),
        ("me/a b", "no id on the Hub"),
        ("me/a/b", "no id on the Hub"),
    ],
)
def test_repositories_that_are_not_ours(name, said, hub, upload):
    status, _, err = upload(name=name)
    assert status == 2
    assert said in err
    assert hub.repositories == {}


def test_an_organisation_one_writes_for(hub, upload):
    assert upload(name="lab/model")[0] == 0
    assert remote(hub, name="lab/model")


def test_a_token_that_only_reads(hub, upload):
    hub.whoami["auth"]["accessToken"]["role"] = "read"
    status, _, err = upload()
    assert status == 2
    assert "only reads" in err
    assert hub.asked("POST") == []


def test_a_public_repository_is_not_taken_for_a_private_one(hub, upload):
    hub.repositories[NAME] = Repository(private=False)
    status, _, err = upload()
    assert status == 2
    assert "--public" in err
    # Nor by a branch that is still to be made.
    assert upload("--revision", "new")[0] == 2
    assert hub.asked("POST") == []
    assert upload("--public")[0] == 0


def test_other_weights_in_the_repository(hub, upload):
    old = {"model-00001-of-00099.safetensors": ("0" * 64, 5), "notes.txt": b"mine"}
    hub.repositories[NAME] = Repository(branches={"main": old})
    status, _, err = upload()
    assert status == 2
    assert "-of-00099.safetensors" in err
    del old["model-00001-of-00099.safetensors"]
    status, _, err = upload("--public")
    assert status == 0
    assert "notes.txt" in err
    assert "stays so" in err
    assert remote(hub)["notes.txt"] == b"mine"


def test_another_model_under_the_same_names_is_not_replaced(hub, upload, directory):
    """Its source, say: that has no record of kept experts."""
    shard = min(path.name for path in directory.glob("*.safetensors"))
    there = {shard: ("0" * 64, 5), "config.json": b"{}"}
    hub.repositories[NAME] = Repository(branches={"main": there})
    status, _, err = upload()
    assert status == 2
    assert f"holds another model, whose {shard} would be replaced" in err
    assert hub.asked("POST") == []
    # An earlier pruning may be, and so may what an upload that was cut has left.
    there["reap/kept_experts.json"] = b"{}"
    assert upload()[0] == 0
    sent = remote(hub)
    hub.repositories[NAME] = Repository(branches={"main": {shard: sent[shard]}})
    assert upload()[0] == 0


def test_what_somebody_put_there_is_named(upload, directory):
    status, _, err = upload("--dry-run")
    assert (status, "put beside" in err) == (0, False)
    (directory / "notes.txt").write_text("mine")
    (directory / "sub").mkdir()
    (directory / "sub" / "draft.md").write_text("mine")
    assert "sent with it: notes.txt, sub/draft.md;" in upload("--dry-run")[2]


def lose_a_shard(directory):
    max(directory.glob("*.safetensors")).unlink()


def cut_a_shard(directory):
    shard = max(directory.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])


def lie_in_the_index(directory):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))


def lose_the_index(directory):
    (directory / "model.safetensors.index.json").unlink()


def strange_weights(directory):
    (directory / "old.gguf").write_bytes(b"GGUF")


def no_front_matter(directory):
    (directory / "README.md").write_text("# A model\n")


def broken_front_matter(directory):
    (directory / "README.md").write_text("---\ntags: [a\n---\n# A model\n")


def front_matter_of_another_kind(directory):
    (directory / "README.md").write_text("---\ntags: [moe]\nlicense_link: [a]\n---\n# A model\n")


def no_tags(directory):
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")


def no_card(directory):
    (directory / "README.md").unlink()


def lose_kept(directory):
    path = directory / "reap" / "kept_experts.json"
    path.write_text(json.dumps({"num_experts": 8, "kept": {"1": [0]}}))


def no_facts(directory):
    (directory / "reap" / "card.json").unlink()


def broken_record(directory):
    (directory / "reap" / "SHA256SUMS").write_text("what is this\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose_a_shard, "safetensors"),
        (cut_a_shard, "safetensors"),
        (lie_in_the_index, "total_size"),
        (lose_the_index, "index.json"),
        (strange_weights, "old.gguf"),
        (no_front_matter, "no front matter"),
        (broken_front_matter, "cannot be read"),
        (front_matter_of_another_kind, "license_link is"),
        (no_tags, "no tags"),
        (no_card, "README.md"),
        (lose_kept, "kept_experts.json"),
        (no_facts, "card.json"),
        (broken_record, "SHA256SUMS"),
    ],
)
def test_what_is_not_whole_is_not_sent(damage, said, hub, upload, directory):
    damage(directory)
    status, _, err = upload()
    assert status == 2
    assert said in err
    assert hub.asked("PUT") == hub.asked("POST") == []


def test_a_directory_of_several_targets(hub, tmp_path, pruned, capsys):
    shutil.copytree(pruned, tmp_path / "both" / "keep-4")
    assert main(["upload", str(tmp_path / "both"), NAME]) == 2
    assert "keep-4" in capsys.readouterr().err


def test_a_file_that_is_too_long(upload, monkeypatch):
    monkeypatch.setattr("reap_stream.upload.checks.MAX_FILE_NBYTES", 1000)
    status, _, err = upload("--dry-run")
    assert status == 2
    assert "--max-shard-size" in err
