"""Uploads that are cut, branches, and repositories that hold something already."""

from __future__ import annotations

import hashlib

import pytest

from tests import upload_server
from tests.upload_server import FIRST, NAME, Fault, Repository, remote

pruned, directory = upload_server.pruned, upload_server.directory
hub, upload = upload_server.hub, upload_server.upload

OTHER = {"model-00001-of-00099.safetensors": ("0" * 64, 5), "config.json": b"{}"}


def hashes(directory):
    return {
        hashlib.sha256(path.read_bytes()).hexdigest(): path.name
        for path in directory.glob("**/*.safetensors")
    }


@pytest.mark.parametrize("status", [403, 503], ids=["refused", "unavailable"])
def test_a_cut_upload_sends_what_is_missing_and_nothing_else(status, hub, upload, directory):
    weights = hashes(directory)
    cut = max(weights, key=weights.get)
    hub.faults.append(Fault("PUT", cut, status, times=99))
    found, _, err = upload()
    assert found == 1
    assert NAME in err
    before = set(hub.stored)
    assert before < set(weights)
    assert cut not in before
    assert remote(hub) == {}
    hub.faults.clear()
    hub.forget()
    assert upload()[0] == 0
    sent = [path.rpartition("/")[2] for path in hub.asked("PUT", "/storage/")]
    assert sorted(sent) == sorted(set(weights) - before)
    assert len(remote(hub)) > len(weights)


def test_a_third_run_sends_nothing(hub, upload):
    assert upload()[0] == 0
    commits = hub.repositories[NAME].commits
    hub.forget()
    status, out, _ = upload()
    assert status == 0
    assert hub.asked("PUT") == []
    assert hub.repositories[NAME].commits == commits
    assert "lengths and hashes read back are the same" in out


# 0: the connection ends without an answer.
@pytest.mark.parametrize(
    ("method", "part", "status"),
    [
        ("GET", "whoami", 429),
        ("GET", "/api/models/", 502),
        ("POST", "/repos/create", 0),
        ("POST", "/branch/", 429),
        ("POST", "/preupload/", 502),
        ("POST", "/batch", 429),
        ("PUT", "/storage/", 0),
        ("PUT", "/storage/", 429),
        ("PUT", "/storage/", 502),
        ("POST", "/commit/", 0),
        ("POST", "/commit/", 502),
        ("GET", "/revision/v2", 0),
    ],
)
def test_what_passes_is_waited_for_at_every_step(method, part, status, hub, upload):
    hub.faults.append(Fault(method, part, status))
    found, _, err = upload("--revision", "v2")
    assert found == 0, err
    assert not hub.faults[0].times
    assert remote(hub, "v2")


@pytest.mark.parametrize(
    ("method", "part", "code", "status", "said"),
    [
        ("GET", "whoami", 2, 429, "slow down"),
        ("GET", "whoami", 2, 500, "same command"),
        ("GET", "/api/models/", 2, 403, "may not write"),
        ("POST", "/batch", 1, 401, "hf auth login"),
        ("POST", "/commit/", 1, 403, "may not write"),
        ("POST", "/commit/", 1, 429, "slow down"),
    ],
)
def test_what_does_not_pass_says_what_to_do(method, part, code, status, said, hub, upload):
    hub.faults.append(Fault(method, part, status, times=99))
    found, _, err = upload()
    assert found == code
    assert said in err
    assert f"{NAME}: " in err


def test_the_listing_may_fail_after_all_was_sent(hub, upload):
    """Then all is there: the same command again finds it so."""

    class Then(list):
        def append(self, message):
            super().append(message)
            hub.faults.append(Fault("GET", "/api/models/", 500, times=99))

    hub.messages = Then()
    status, _, err = upload()
    assert status == 1
    assert "reading the listing back failed" in err
    assert "same command" in err
    hub.faults.clear()
    hub.forget()
    assert upload()[0] == 0
    assert hub.asked("PUT") == hub.asked("POST", "/commit/") == []


def test_shards_of_an_earlier_upload_are_named_with_the_command_that_deletes_them(hub, upload):
    hub.repositories[NAME] = Repository(branches={"main": dict(OTHER)})
    for more in ((), ("--revision", "main")):
        status, _, err = upload(*more)
        assert status == 2
        command = f"hf repos delete-files {NAME} 'model-*-of-00099.safetensors'"
        assert " ".join([command, *more]) in err
    assert hub.asked("POST") == []


def test_a_new_branch_begins_without_what_main_holds(hub, upload):
    """The Hub would begin it at main's last commit, with another variant's shards."""
    hub.repositories[NAME] = Repository(branches={"main": dict(OTHER)})
    status, _, err = upload("--revision", "keep-4")
    assert status == 0, err
    assert "model-00001-of-00099.safetensors" not in remote(hub, "keep-4")
    assert remote(hub) == OTHER
    # It is there now, and is what was sent.
    assert upload("--revision", "keep-4")[0] == 0


def test_a_branch_that_cannot_begin_without_other_weights(hub, upload):
    hub.repositories[NAME] = Repository(branches={"main": dict(OTHER)}, first=dict(OTHER))
    status, _, err = upload("--revision", "keep-4")
    assert status == 2
    assert "of-00099.safetensors" in err
    assert list(hub.repositories[NAME].branches) == ["main"]


def test_a_pull_request_must_be_there(hub, upload):
    hub.repositories[NAME] = Repository()
    status, _, err = upload("--revision", "refs/pr/1")
    assert status == 2
    assert "open the pull request" in err
    hub.repositories[NAME].branches["refs/pr/1"] = {}
    assert upload("--revision", "refs/pr/1")[0] == 0
    assert hub.asked("POST", "/branch/") == []
    assert remote(hub, "refs/pr/1")
    assert remote(hub) == {}


def test_weights_that_appear_meanwhile_are_found(hub, upload):
    """Between the check before and the look after."""

    def late(entry):
        sent = remote(hub)
        return (
            {**entry, "rfilename": "late.bin"} if sent and ".git" in entry["rfilename"] else entry
        )

    hub.tamper = late
    status, _, err = upload()
    assert status == 1
    assert f"hf repos delete-files {NAME} late.bin" in err


def fine_grained(*scopes, everywhere=()):
    """What `whoami` says of a token for chosen repositories: (type, name, permissions)."""
    scoped = [
        {"entity": {"_id": "1", "type": kind, **({"name": name} if name else {})}, "permissions": p}
        for kind, name, p in scopes
    ]
    described = {"scoped": scoped, "global": list(everywhere), "canReadGatedRepos": False}
    return {"displayName": "t", "role": "fineGrained", "fineGrained": described}


READ, WRITE = ["repo.content.read"], ["repo.content.read", "repo.write"]


@pytest.mark.parametrize(
    ("token", "name"),
    [
        (fine_grained(("user", "me", WRITE)), "me/model"),
        (fine_grained(("user", "me", READ), ("org", "lab", WRITE)), "lab/model"),
        # Of organisations that the token does not name otherwise.
        (fine_grained(("model", "far/model", ["repo.content.write"])), "far/model"),
        # Open what it may: the Hub will say.
        (fine_grained(("model", None, WRITE)), "me/model"),
        (fine_grained(everywhere=["repo.write"]), "me/model"),
        ({"role": "fineGrained"}, "me/model"),
        ({"role": "write"}, "lab/model"),
        (None, "me/model"),
    ],
)
def test_tokens_that_may_write(token, name, hub, upload):
    hub.whoami["auth"] = {"accessToken": token}
    status, _, err = upload(name=name)
    assert status == 0, err
    assert FIRST not in remote(hub, name=name)


@pytest.mark.parametrize(
    ("token", "name", "said"),
    [
        (fine_grained(("user", "me", READ)), "me/model", "no repository"),
        (fine_grained(("user", "me", WRITE)), "lab/model", "may write to me:"),
        (fine_grained(("model", "me/one", WRITE)), "me/two", "may write to me/one"),
        (fine_grained(("org", "ro", WRITE)), "ro/model", "may only read in ro"),
        (fine_grained(), "me/model", "no repository"),
    ],
)
def test_tokens_for_other_repositories(token, name, said, hub, upload):
    hub.whoami["auth"] = {"accessToken": token}
    status, _, err = upload(name=name)
    assert status == 2
    assert said in err
    assert "hf auth login" in err or "read" in said
    assert hub.asked("POST") == []
