"""What the tests' servers on loopback share: their threads, a log of requests, answers and faults.

    class MyServer(LoopbackServer):      state
    class MyHandler(LoopbackHandler):    routes: a pattern of paths, and the method that answers

Every request is noted before it is answered, with the bytes of the body that went out.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_CHUNK_NBYTES = 1 << 14
# The default would let every test wait for half a second at its end.
_POLL_SECONDS = 0.01
# huggingface_hub asks this before anything else, once: in which test, their order decides.
_ONCE_A_PROCESS = "/api/agent-harnesses"


@dataclass
class Request:
    """One request that came in."""

    method: str
    path: str
    range: str | None = None
    status: int = 0
    nbytes: int = 0
    has_token: bool = False


@dataclass(kw_only=True)
class Misfortune:
    """What goes wrong with a body on its way; `LoopbackHandler.send` sees to it.

    Attributes:
        kind: ``cut`` (the connection ends after `after` bytes), ``short`` (a body of `after` bytes
            that is said to be all), ``slow`` (a pause before every chunk), ``altered`` (byte
            `after` is another).
        times: how many answers are such.
    """

    kind: str = ""
    times: int = 1
    after: int = 0
    seconds: float = 0.01

    def befalls(self, method: str, path: str) -> bool:
        """Whether a request is one of these."""
        raise NotImplementedError

    def said(self, body: bytes) -> bytes:
        """The body that the answer speaks of."""
        if self.kind == "short":
            return body[: self.after]
        if self.kind == "altered" and self.after < len(body):
            return body[: self.after] + bytes([body[self.after] ^ 1]) + body[self.after + 1 :]
        return body


class LoopbackServer:
    """Servers of one test, with what they have in common.

    Args:
        handler: answers requests.
        names: of this machine; a server for each.
    """

    def __init__(
        self, handler: type[LoopbackHandler], names: tuple[str, ...] = ("127.0.0.1",)
    ) -> None:
        self.faults: list[Any] = []
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self._servers = [_Http(("127.0.0.1", 0), handler) for _ in names]
        ports = [server.server_address[1] for server in self._servers]
        self.urls = [f"http://{name}:{port}" for name, port in zip(names, ports, strict=True)]
        for server in self._servers:
            server.hub = self
            threading.Thread(
                target=server.serve_forever, args=(_POLL_SECONDS,), daemon=True
            ).start()

    @property
    def url(self) -> str:
        """Where clients begin."""
        return self.urls[0]

    def fault(self, method: str, path: str) -> Any:
        """The fault of a request, used up by this; None: all goes well."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.befalls(method, path):
                    fault.times -= 1
                    return fault
        return None

    def forget(self) -> None:
        """Begin the notes anew."""
        with self.lock:
            self.requests.clear()

    @contextmanager
    def running(self):
        """The server for the length of a block."""
        try:
            yield self
        finally:
            for server in self._servers:
                server.shutdown()
                server.server_close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    hub: Any


class LoopbackHandler(BaseHTTPRequestHandler):
    """Answers requests by the first of `routes` whose pattern is the whole path."""

    protocol_version = "HTTP/1.1"
    routes: tuple[tuple[str, str], ...] = ()

    @property
    def hub(self) -> Any:
        """The server."""
        return self.server.hub

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def do_GET(self):
        self._begin()

    def do_HEAD(self):
        self._begin()

    def do_POST(self):
        self._begin()

    def do_PUT(self):
        self._begin()

    def _begin(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.note = Request(
            self.command,
            unquote(url.path),
            self.headers.get("Range"),
            has_token="Authorization" in self.headers,
        )
        if self.note.path != _ONCE_A_PROCESS:
            with self.hub.lock:
                self.hub.requests.append(self.note)
        self.answer(self.note.path)

    def answer(self, path: str) -> None:
        """Answers the request that was noted."""
        for pattern, name in self.routes:
            if match := re.fullmatch(pattern, path):
                getattr(self, name)(*match.groups())
                return
        self.refuse(404, "EntryNotFound")

    def send_content(self, body: bytes, headers: Mapping[str, str], fault: Any = None) -> None:
        """Sends a file, or of it what was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.note.range or "")
        if asked is None:
            self.send(200, body, headers, fault)
            return
        begin, end = int(asked[1]), min(int(asked[2] or len(body)) + 1, len(body))
        about = {"Content-Range": f"bytes {begin}-{end - 1}/{len(body)}"}
        self.send(206, body[begin:end], {**headers, **about}, fault)

    def send_json(self, value: Any, status: int = 200, headers: Any = None) -> None:
        """Sends a document."""
        about = {"Content-Type": "application/json", **(headers or {})}
        self.send(status, json.dumps(value).encode(), about)

    def refuse(self, status: int, code: str | None, headers: Any = None) -> None:
        """Sends the Hub's code of an error, and no body."""
        more = {} if code is None else {"X-Error-Code": code}
        self.send(status, b"", {**more, **(headers or {})})

    def send(self, status: int, body: bytes, headers: Mapping[str, str], fault: Any = None) -> None:
        """Sends an answer, with what goes wrong with it."""
        fault = fault if fault is not None else Misfortune()
        body = fault.said(body)
        self.note.status = status
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        allowed = fault.after if fault.kind == "cut" else len(body)
        for start in range(0, allowed, _CHUNK_NBYTES):
            if fault.kind == "slow":
                time.sleep(fault.seconds)
            part = body[start : min(start + _CHUNK_NBYTES, allowed)]
            try:
                self.wfile.write(part)
            except OSError:
                self.close_connection = True
                return
            self.note.nbytes += len(part)
        if fault.kind == "cut":
            self.close_connection = True


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def blob_id(content: bytes) -> str:
    """Git's hash of a file."""
    data = b"blob %d\0" % len(content) + content
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def files_below(directory: Path) -> list[Path]:
    """Every file, sorted."""
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]
