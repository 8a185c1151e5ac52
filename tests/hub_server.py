"""A server on loopback that speaks the file protocol of the Hugging Face Hub, and misbehaves on order.

What it knows of the protocol: a repository's listing with sizes and hashes, files at a revision with
`X-Repo-Commit` and `ETag`, large files by a redirect to another place, ranges, tokens, and the error
codes that huggingface_hub reads. Every request is noted, with the bytes that went out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.loopback import (
    LoopbackHandler,
    LoopbackServer,
    Misfortune,
    Request,
    blob_id,
    files_below,
    sha256,
)

TOKEN = "hf_token_of_the_test"  # a made-up one
_LARGE = (".safetensors", ".bin", ".parquet")


class Fault(Misfortune):
    """What goes wrong with files whose name ends as said.

    Args:
        name: end of the file's name; ``api``: listings.
        kind: as `Misfortune`, or ``status`` (an answer of that status).
        status: the answer's status.
        headers: further ones of that answer.
    """

    def __init__(
        self, name: str, kind: str, *, status: int = 0, headers: Any = None, **more: Any
    ) -> None:
        super().__init__(kind=kind, **more)
        self.name = name
        self.status = status
        self.headers = headers

    def befalls(self, method: str, path: str) -> bool:
        """Bodies alone go wrong."""
        return method == "GET" and path.endswith(self.name)


@dataclass
class Repository:
    """Files at one commit, and who may have them.

    Attributes:
        also: files of older commits.
        large: whether the Hub keeps a file outside git.
    """

    directory: Path
    commit: str
    kind: str = "models"
    gated: bool = False
    private: bool = False
    also: dict[str, Path] = field(default_factory=dict)
    large: Callable[[Path], bool] = lambda path: path.name.endswith(_LARGE)

    def at(self, revision: str) -> Path | None:
        """The files of a revision."""
        return self.directory if revision in ("main", self.commit) else self.also.get(revision)


class HubServer(LoopbackServer):
    """The server; use `serving`.

    Args:
        prefix: path before all others, as of a mirror below a site of its own.
    """

    def __init__(self, prefix: str = "") -> None:
        # Large files lie with another host, which is not to see tokens. By another name too: some
        # clients tell hosts apart by their names alone.
        super().__init__(_Handler, ("127.0.0.1", "localhost"))
        self.repositories: dict[str, Repository] = {}
        self.prefix = prefix
        self.ignores_ranges = False
        # Does to a listing what no Hub would.
        self.alter: Callable[[dict[str, Any]], Any] = lambda _: None

    @property
    def url(self) -> str:
        """What `HF_ENDPOINT` is to be."""
        return f"{self.urls[0]}{self.prefix}"

    def add(self, repository: str, directory: Path, **options: Any) -> str:
        """Serve a directory; its commit, which follows from what it holds."""
        text = "".join(f"{path}{sha256(path)}" for path in files_below(directory))
        commit = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.repositories[repository] = Repository(directory, commit, **options)
        return commit

    def move(self, repository: str, directory: Path) -> str:
        """Put other files on the main branch; the commit that was there stays. Gives the new one."""
        old = self.repositories[repository]
        commit = self.add(repository, directory)
        self.repositories[repository].also = {**old.also, old.commit: old.directory}
        return commit

    def sent(self, name: str = "") -> int:
        """Bytes of bodies that went out for files whose path ends so."""
        with self.lock:
            return sum(r.nbytes for r in self.requests if r.path.endswith(name))

    def asked(self, method: str, name: str) -> list[Request]:
        """Requests for files whose path ends so."""
        with self.lock:
            return [r for r in self.requests if r.method == method and r.path.endswith(name)]


def serving(prefix: str = ""):
    """A server for the length of a block."""
    return HubServer(prefix).running()


def listed_nbytes(path: Path) -> int:
    """The length that listings give."""
    return path.stat().st_size


class _Handler(LoopbackHandler):
    routes = (
        (r"/api/(\w+)/([^/]+/[^/]+)(?:/revision/(.+))?", "_listing"),
        (r"/large/([^/]+/[^/]+)/([^/]+)/(.+)", "_large"),
        (r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "_resolve"),
    )

    def answer(self, path):
        inside = path.removeprefix(self.hub.prefix)
        if self.hub.prefix and inside == path and not path.startswith("/large/"):
            self.refuse(404, None)
        else:
            super().answer(inside)

    def _listing(self, kind, name, revision):
        repository = self.hub.repositories.get(name)
        if repository is None or repository.kind != kind or self._is_hidden(repository):
            self.refuse(404 if self._has_token() else 401, "RepoNotFound")
            return
        fault = self.hub.fault("GET", "api")
        if fault is not None:
            self.refuse(fault.status, None, fault.headers)
            return
        directory = repository.at(revision or "main")
        if directory is None:
            self.refuse(404, "RevisionNotFound")
            return
        document = {
            "id": name,
            "sha": repository.commit if revision in (None, "main") else revision,
            "gated": "manual" if repository.gated else False,
            "private": repository.private,
            "tags": [],
            "downloads": 0,
            "siblings": [_sibling(repository, directory, p) for p in files_below(directory)],
        }
        self.hub.alter(document)
        self.send_json(document)

    def _resolve(self, name, revision, rest):
        repository = self.hub.repositories.get(name)
        if repository is None or self._is_hidden(repository):
            self.refuse(401, "RepoNotFound")
            return
        if repository.gated and not self._has_token():
            self.refuse(401, "GatedRepo")
            return
        directory = repository.at(revision)
        if directory is None:
            self.refuse(404, "RevisionNotFound")
            return
        path = directory / rest
        commit = repository.commit if revision == "main" else revision
        if not path.is_file():
            self.refuse(404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
            return
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not repository.large(path):
            self._file(path, {**headers, "ETag": f'"{blob_id(path.read_bytes())}"'})
            return
        headers |= {
            "X-Linked-Size": str(path.stat().st_size),
            "X-Linked-ETag": f'"{sha256(path)}"',
            "Location": f"{self.hub.urls[1]}/large/{name}/{commit}/{rest}",
        }
        self.send(302, b"", headers)

    def _large(self, name, revision, rest):
        self._file(self.hub.repositories[name].at(revision) / rest, {})

    def _file(self, path, headers):
        fault = self.hub.fault(self.command, path.name)
        if fault is not None and fault.kind == "status":
            self.refuse(fault.status, None, fault.headers)
        else:
            if self.hub.ignores_ranges:
                self.note.range = None
            self.send_content(path.read_bytes(), headers, fault)

    def _has_token(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _is_hidden(self, repository):
        return repository.private and not self._has_token()


def _sibling(repository, directory, path):
    nbytes = listed_nbytes(path)
    entry = {
        "rfilename": path.relative_to(directory).as_posix(),
        "size": nbytes,
        "blobId": blob_id(path.read_bytes()),
    }
    if repository.large(path):
        entry["lfs"] = {"size": nbytes, "sha256": sha256(path), "pointerSize": 134}
    return entry
