"""A Hub on the loopback interface: the few routes that reading a data set takes.

Its data sets are the directories `org/name` below a root. Of those whose name begins with "gated"
the files are refused, as the Hub refuses them to whom has not accepted the conditions.
"""

from __future__ import annotations

import json
import re
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

COMMIT = "a1" * 20
BRANCHES = ("main", "v1.0", COMMIT)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, root, log, *rest):
        self.root = root
        self.log = log
        super().__init__(*rest)

    def log_message(self, *_):
        """Says nothing."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.log.append((self.command, url.path))
        for pattern, answer in (
            (r"/api/datasets", self._search),
            (r"/api/datasets/([^/]+/[^/]+)/auth-check", self._auth_check),
            (r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", self._tree),
            (r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            if match := re.fullmatch(pattern, url.path):
                answer(*match.groups())
                return
        self._refuse(404, "NotFound")

    def _search(self):
        names = [f"{path.parent.name}/{path.name}" for path in sorted(self.root.glob("*/*"))]
        owner, word = (self.query.get(key, [""])[0] for key in ("author", "search"))
        fits = [n for n in names if n.startswith(f"{owner}/" if owner else "") and word in n]
        self._json([{"id": name} for name in fits])

    def _info(self, name, revision):
        root = self.root / name
        if not root.is_dir():
            self._refuse(401, "RepoNotFound")
        elif revision is not None and revision not in BRANCHES:
            self._refuse(404, "RevisionNotFound")
        else:
            paths = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
            files = [{"rfilename": str(path)} for path in paths]
            gated = "manual" if "/gated" in name else False
            self._json({"id": name, "sha": COMMIT, "gated": gated, "siblings": files})

    def _auth_check(self, name):
        if "/gated" in name:
            self._refuse(403, "GatedRepo")
        else:
            self._json({})

    def _tree(self, name, folder):
        root, folder = self.root / name, folder or ""
        if not (root / folder).is_dir():
            self._refuse(404, "EntryNotFound")
            return
        recursive = self.query.get("recursive", [""])[0].lower() == "true"
        self._json(
            [
                {
                    "type": "file" if path.is_file() else "directory",
                    "path": str(path.relative_to(root)),
                    "size": path.stat().st_size if path.is_file() else 0,
                    "oid": "0" * 40,
                }
                for path in sorted((root / folder).glob("**/*" if recursive else "*"))
            ]
        )

    def _file(self, name, revision, path):
        file = self.root / name / path
        if not file.is_file():
            self._refuse(404, "EntryNotFound")
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{len(content)}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, content, headers)
            return
        start = int(asked[1])
        stop = min(int(asked[2]) + 1 if asked[2] else len(content), len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, content[start:stop], headers)

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status, code):
        self._send(status, b"", {"X-Error-Code": code})

    def _send(self, status, content, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serving(root: Path):
    """Serves data sets; gives the endpoint and the list of (method, path) that were asked for."""
    log: list[tuple[str, str]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, root, log))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
