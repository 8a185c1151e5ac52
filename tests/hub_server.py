"""A server on loopback that speaks the file protocol of the Hugging Face Hub, and misbehaves on order.

What it knows of the protocol: a repository's listing with sizes and hashes, files at a revision with
`X-Repo-Commit` and `ETag`, large files by a redirect to another place, ranges, tokens, and the error
codes that huggingface_hub reads. Every request is noted, with the bytes that went out.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token_of_the_test"  # a made-up one
_CHUNK_NBYTES = 1 << 14
_LARGE = (".safetensors", ".bin", ".parquet")


@dataclass
class Fault:
    """What goes wrong with files whose name ends as said.

    Attributes:
        name: end of the file's name.
        kind: ``cut`` (the connection ends after `after` bytes), ``short`` (a body of `after` bytes
            that is said to be all), ``slow`` (a pause before every chunk), ``altered`` (a byte is
            another), ``status`` (an answer of that status).
        times: how many answers are such.
        after: bytes that go out first.
        status: the answer's status.
        headers: further ones of that answer.
        methods: requests that it befalls.
    """

    name: str
    kind: str
    times: int = 1
    after: int = 0
    status: int = 0
    seconds: float = 0.01
    headers: dict[str, str] = field(default_factory=dict)
    methods: tuple[str, ...] = ("GET",)


@dataclass
class Request:
    """One request that came in."""

    method: str
    path: str
    range: str | None
    status: int = 0
    nbytes: int = 0
    has_token: bool = False


@dataclass
class Repository:
    """Files at one commit, and who may have them."""

    directory: Path
    commit: str
    kind: str = "models"
    gated: bool = False
    private: bool = False
    also: dict[str, Path] = field(default_factory=dict)

    def at(self, revision: str) -> Path | None:
        """The files of a revision; `also` holds those of older commits."""
        return self.directory if revision in ("main", self.commit) else self.also.get(revision)


class HubServer:
    """The server; use `serving`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        # Does to a listing what no Hub would.
        self.alter: Callable[[dict[str, Any]], Any] = lambda _: None
        self.lock = threading.Lock()
        # Large files lie with another host, which is not to see tokens.
        self._servers = [_Http(("127.0.0.1", 0), _Handler) for _ in range(2)]
        ports = [server.server_address[1] for server in self._servers]
        # By another name too: some clients tell hosts apart by their names alone.
        names = ("127.0.0.1", "localhost")
        pairs = zip(names, ports, strict=True)
        self.url, self.storage_url = (f"http://{name}:{port}" for name, port in pairs)
        for server in self._servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def add(self, repository: str, directory: Path, **options: Any) -> str:
        """Serve a directory; its commit, which follows from what it holds."""
        text = "".join(f"{p}{sha256(p)}" for p in sorted(directory.rglob("*")) if p.is_file())
        commit = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.repositories[repository] = Repository(directory, commit, **options)
        return commit

    def sent(self, name: str = "") -> int:
        """Bytes of bodies that went out for files whose path ends so."""
        with self.lock:
            return sum(r.nbytes for r in self.requests if r.path.endswith(name))

    def asked(self, method: str, name: str) -> list[Request]:
        """Requests for files whose path ends so."""
        with self.lock:
            return [r for r in self.requests if r.method == method and r.path.endswith(name)]

    def forget(self) -> None:
        """Begin the notes anew."""
        with self.lock:
            self.requests.clear()

    def fault(self, method: str, name: str) -> Fault | None:
        """The next fault of a file, used up by this."""
        with self.lock:
            for fault in self.faults:
                if fault.times and method in fault.methods and name.endswith(fault.name):
                    fault.times -= 1
                    return fault
        return None

    def close(self) -> None:
        """End the server."""
        for server in self._servers:
            server.shutdown()
            server.server_close()


@contextmanager
def serving():
    """A server for the length of a block."""
    server = HubServer()
    try:
        yield server
    finally:
        server.close()


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def blob_id(path: Path) -> str:
    """Git's hash of a file."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def listed_nbytes(path: Path) -> int:
    """The length that listings give."""
    return path.stat().st_size


def is_large(path: Path) -> bool:
    """Whether the Hub keeps a file outside git."""
    return path.name.endswith(_LARGE)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def do_GET(self):
        self._answer("GET")

    def do_HEAD(self):
        self._answer("HEAD")

    def _answer(self, method: str) -> None:
        url = urlsplit(self.path)
        self.note = Request(
            method,
            unquote(url.path),
            self.headers.get("Range"),
            has_token="Authorization" in self.headers,
        )
        with self.hub.lock:
            self.hub.requests.append(self.note)
        parts = self.note.path.strip("/").split("/")
        if parts[0] == "api":
            self._listing(parts[1], "/".join(parts[2:4]), parts[5:])
        elif parts[0] == "large":
            repository = self.hub.repositories["/".join(parts[1:3])]
            self._file(method, repository.at(parts[3]).joinpath(*parts[4:]))
        elif "resolve" in parts:
            at = parts.index("resolve")
            self._resolve(method, "/".join(parts[at - 2 : at]), parts[at + 1], parts[at + 2 :])
        else:
            self._refuse(404, "EntryNotFound")

    def _listing(self, kind, name, revision):
        repository = self.hub.repositories.get(name)
        if repository is None or repository.kind != kind or self._is_hidden(repository):
            self._refuse(401 if not self._has_token() else 404, "RepoNotFound")
            return
        fault = self.hub.fault("GET", "api")
        if fault is not None:
            self._refuse(fault.status, None, fault.headers)
            return
        directory = repository.at(revision[0] if revision else "main")
        if directory is None:
            self._refuse(404, "RevisionNotFound")
            return
        commit = revision[0] if revision and revision[0] != "main" else repository.commit
        document = {
            "id": name,
            "sha": commit,
            "gated": "manual" if repository.gated else False,
            "private": repository.private,
            "tags": [],
            "downloads": 0,
            "siblings": [self._sibling(directory, p) for p in _files(directory)],
        }
        self.hub.alter(document)
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _sibling(self, directory, path):
        nbytes = listed_nbytes(path)
        entry = {
            "rfilename": path.relative_to(directory).as_posix(),
            "size": nbytes,
            "blobId": blob_id(path),
        }
        if is_large(path):
            entry["lfs"] = {"size": nbytes, "sha256": sha256(path), "pointerSize": 134}
        return entry

    def _resolve(self, method, name, revision, rest):
        repository = self.hub.repositories.get(name)
        if repository is None or self._is_hidden(repository):
            self._refuse(401, "RepoNotFound")
            return
        if repository.gated and not self._has_token():
            self._refuse(401, "GatedRepo")
            return
        directory = repository.at(revision)
        if directory is None:
            self._refuse(404, "RevisionNotFound")
            return
        path = directory.joinpath(*rest)
        commit = repository.commit if revision == "main" else revision
        if not path.is_file():
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
            return
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not is_large(path):
            self._file(method, path, {**headers, "ETag": f'"{blob_id(path)}"'})
            return
        headers |= {
            "X-Linked-Size": str(path.stat().st_size),
            "X-Linked-ETag": f'"{sha256(path)}"',
            "Location": f"{self.hub.storage_url}/large/{name}/{commit}/{'/'.join(rest)}",
        }
        self._send(302, b"", headers)

    def _file(self, method, path, headers=None):
        fault = self.hub.fault(method, path.name)
        if fault is not None and fault.kind == "status":
            self._refuse(fault.status, None, fault.headers)
            return
        data = path.read_bytes()
        begin, end, status = 0, len(data), 200
        headers = {**(headers or {})}
        if self.note.range:
            first, _, last = self.note.range.removeprefix("bytes=").partition("-")
            begin, end, status = int(first), min(int(last or end) + bool(last), end), 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self._send(status, data[begin:end], headers, fault)

    def _send(self, status, body, headers, fault=None):
        kind = fault.kind if fault is not None else ""
        if kind == "short":
            body = body[: fault.after]
        if kind == "altered":
            body = body[: fault.after] + bytes([body[fault.after] ^ 1]) + body[fault.after + 1 :]
        self.note.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        allowed = fault.after if kind == "cut" else len(body)
        if self.command == "HEAD":
            return
        for start in range(0, allowed, _CHUNK_NBYTES):
            if kind == "slow":
                time.sleep(fault.seconds)
            part = body[start : min(start + _CHUNK_NBYTES, allowed)]
            try:
                self.wfile.write(part)
            except OSError:
                self.close_connection = True
                return
            self.note.nbytes += len(part)
        if kind == "cut":
            self.close_connection = True

    def _refuse(self, status, code, headers=None):
        more = {} if code is None else {"X-Error-Code": code}
        self._send(status, b"", {**more, **(headers or {})})

    def _has_token(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _is_hidden(self, repository):
        return repository.private and not self._has_token()


def _files(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]
