"""A server on loopback that takes uploads as the Hugging Face Hub does, and fails on order.

What it knows of the protocol: who a token belongs to, making repositories and branches, which files
are large, the LFS batch and its storage, commits as lines of JSON, and listings with hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from reap_stream.cli import main
from tests.engine import prune_to
from tests.loopback import LoopbackHandler, LoopbackServer, blob_id
from tests.model_hub_client import point_at

NAME = "me/tiny-REAP"
TOKEN = "hf_token_of_the_upload_test"  # a made-up one
SIGNATURE = "whoever_has_it_may_write"
FIRST = "f" * 40
"""The commit with which every repository begins."""


@dataclass
class Fault:
    """What goes wrong with requests.

    Attributes:
        method: of the request.
        part: of its path.
        status: the answer's; 0: the connection ends without one.
        times: how many requests it befalls.
    """

    method: str
    part: str
    status: int = 0
    times: int = 1

    def befalls(self, method: str, path: str) -> bool:
        """Whether a request is one of these."""
        return method == self.method and self.part in path


@dataclass
class Repository:
    """Branches of files; large ones as (SHA-256, length), others as bytes."""

    private: bool = True
    branches: dict[str, dict[str, Any]] = field(default_factory=lambda: {"main": {}})
    first: dict[str, Any] = field(default_factory=dict)
    commits: int = 0


class UploadServer(LoopbackServer):
    """The server; use `accepting`."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.whoami: dict[str, Any] = {
            "type": "user",
            "name": "me",
            "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "ro", "roleInOrg": "read"}],
            "auth": {"accessToken": {"displayName": "t", "role": "write"}},
        }
        # Called with the entry of each file of a listing; returns it altered, or None to hide it.
        self.tamper = lambda entry: entry

    def asked(self, method: str, part: str = "") -> list[str]:
        """Paths of requests."""
        with self.lock:
            return [r.path for r in self.requests if r.method == method and part in r.path]


def accepting():
    """A server for the length of a block."""
    return UploadServer().running()


def log_in(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Makes the client of this process a server's, with its token."""
    point_at(monkeypatch, url, cache)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # Xet's transfers are another program's; these are plain HTTP.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def run_upload(directory, capsys, *more, name=NAME):
    """Runs the command; status and what was printed, in which no token may stand."""
    status = main(["upload", str(directory), name, *more])
    printed = capsys.readouterr()
    assert not [secret for secret in (TOKEN, SIGNATURE) if secret in printed.out + printed.err]
    return status, printed.out, printed.err


def remote(hub: UploadServer, branch: str = "main", name: str = NAME) -> dict[str, Any]:
    """Files of a branch."""
    return hub.repositories[name].branches[branch]


@pytest.fixture(scope="module")
def pruned(tiny, calibration, tmp_path_factory):
    """A pruned checkpoint of several shards."""
    output = tmp_path_factory.mktemp("upload") / "pruned"
    return prune_to(output, tiny("glm4_moe"), calibration, max_shard_nbytes=60_000)


@pytest.fixture
def directory(pruned, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(pruned, tmp_path / "checkpoint")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server, and a client that is logged in to it."""
    with accepting() as server:
        log_in(monkeypatch, server.url, tmp_path / "cache")
        # Pauses of huggingface_hub's own between attempts.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        yield server


@pytest.fixture
def upload(hub, directory, capsys):
    """Runs the command; status and what was printed."""

    def run(*more, name=NAME):
        return run_upload(directory, capsys, *more, name=name)

    return run


class _Handler(LoopbackHandler):
    def answer(self, path):
        fault = self.hub.fault(self.command, path)
        if fault is not None and not fault.status:
            self.close_connection = True
            return
        body = self._body()
        if fault is not None:
            # A careless server might say the token again.
            self._send(fault.status, {"error": f"on order, {TOKEN}"})
        elif path.startswith("/storage/"):
            assert "Authorization" not in self.headers
            self.hub.stored[path.rpartition("/")[2]] = body
            self._send(200, {})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid credentials"})
        else:
            self._route(path.strip("/").split("/"), body)

    def _body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while nbytes := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(nbytes))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, parts, body):
        if parts == ["api", "whoami-v2"]:
            self._send(200, self.hub.whoami)
        elif parts == ["api", "validate-yaml"]:
            self._send(200, {"errors": [], "warnings": []})
        elif parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts[0] == "api":
            self._repository("/".join(parts[2:4]), parts[4:], body)
        else:
            self._batch(json.loads(body))

    def _create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.hub.repositories
        if not known:
            private = asked.get("private", asked.get("visibility") == "private")
            self.hub.repositories[name] = Repository(bool(private))
        self._send(409 if known else 200, {"url": f"{self.hub.url}/{name}"})

    def _repository(self, name, rest, body):
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(404, {}, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["branch"]:
            start = json.loads(body or b"{}").get("startingPoint")
            begun = repository.first if start == FIRST else repository.branches["main"]
            repository.branches.setdefault("/".join(rest[1:]), dict(begun))
            self._send(200, {})
        elif rest[:1] == ["commits"]:
            ids = [self._sha(repository.branches["main"]), FIRST]
            self._send(200, [_commit(oid) for oid in ids])
        elif rest[:1] == ["preupload"]:
            self._preupload(repository.branches["/".join(rest[1:])], json.loads(body))
        elif rest[:1] == ["commit"]:
            self._commit(name, repository.branches["/".join(rest[1:])], body)
        else:
            self._listing(name, repository, "/".join(rest[1:]) or "main")

    def _preupload(self, branch, asked):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                **_known(branch.get(file["path"])),
            }
            for file in asked["files"]
        ]
        self._send(200, {"files": files})

    def _batch(self, asked):
        objects = []
        for wanted in asked["objects"]:
            href = f"{self.hub.url}/storage/{wanted['oid']}?X-Amz-Signature={SIGNATURE}"
            upload = {"upload": {"href": href}}
            known = wanted["oid"] in self.hub.stored
            objects.append({**wanted, **({} if known else {"actions": upload})})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name, branch, body):
        lines = [json.loads(line) for line in body.splitlines() if line]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                branch[value["path"]] = base64.b64decode(value["content"])
            else:
                data = self.hub.stored[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                branch[value["path"]] = (value["oid"], len(data))
        self.hub.repositories[name].commits += 1
        oid = self._sha(branch)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self._send(200, {"commitUrl": url, "commitOid": oid})

    def _listing(self, name, repository, revision):
        branch = repository.first if revision == FIRST else repository.branches.get(revision)
        if branch is None:
            self._send(404, {}, {"X-Error-Code": "RevisionNotFound"})
            return
        entries = [_entry(path, content) for path, content in sorted(branch.items())]
        entries.append(_entry(".gitattributes", b"*.safetensors filter=lfs\n"))
        siblings = [e for e in map(self.hub.tamper, entries) if e is not None]
        known = {"id": name, "sha": self._sha(branch), "private": repository.private}
        self._send(200, {**known, "tags": [], "downloads": 0, "siblings": siblings})

    def _sha(self, branch):
        return hashlib.sha1(
            repr(sorted(branch.items())).encode(), usedforsecurity=False
        ).hexdigest()

    def _send(self, status, document, headers=None):
        self.send_json(document, status, headers)


def _known(content: Any) -> dict[str, Any]:
    """What the Hub says of a file that it has: clients then leave out what would be the same."""
    if content is None:
        return {}
    return {"oid": content[0] if isinstance(content, tuple) else blob_id(content)}


def _commit(oid: str) -> dict[str, Any]:
    date = "2026-01-01T00:00:00.000Z"
    return {"id": oid, "title": "a commit", "message": "", "date": date, "authors": []}


def _entry(path: str, content: Any) -> dict[str, Any]:
    if isinstance(content, tuple):
        sha256, nbytes = content
        lfs = {"size": nbytes, "sha256": sha256, "pointerSize": 134}
        return {"rfilename": path, "size": nbytes, "blobId": "0" * 40, "lfs": lfs}
    return {"rfilename": path, "size": len(content), "blobId": blob_id(content)}
