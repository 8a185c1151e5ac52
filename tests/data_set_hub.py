"""A Hub on the loopback interface: the few routes that reading a data set takes.

Its data sets are the directories `org/name` below a root. Of those whose name begins with "gated"
the files are refused, as the Hub refuses them to whom has not accepted the conditions.
"""

from __future__ import annotations

from pathlib import Path

from tests.loopback import LoopbackHandler, LoopbackServer, files_below

COMMIT = "a1" * 20
BRANCHES = ("main", "v1.0", COMMIT)


class DataSetHub(LoopbackServer):
    """The server; use `serving`."""

    def __init__(self, root: Path) -> None:
        super().__init__(_Handler)
        self.root = root


class _Handler(LoopbackHandler):
    routes = (
        (r"/api/datasets", "_search"),
        (r"/api/datasets/([^/]+/[^/]+)/auth-check", "_auth_check"),
        (r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", "_info"),
        (r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", "_tree"),
        (r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "_file"),
    )

    @property
    def root(self):
        return self.hub.root

    def _search(self):
        names = [f"{path.parent.name}/{path.name}" for path in sorted(self.root.glob("*/*"))]
        owner, word = (self.query.get(key, [""])[0] for key in ("author", "search"))
        fits = [n for n in names if n.startswith(f"{owner}/" if owner else "") and word in n]
        self.send_json([{"id": name} for name in fits])

    def _info(self, name, revision):
        root = self.root / name
        if not root.is_dir():
            self.refuse(401, "RepoNotFound")
        elif revision is not None and revision not in BRANCHES:
            self.refuse(404, "RevisionNotFound")
        else:
            files = [{"rfilename": str(path.relative_to(root))} for path in files_below(root)]
            gated = "manual" if "/gated" in name else False
            self.send_json({"id": name, "sha": COMMIT, "gated": gated, "siblings": files})

    def _auth_check(self, name):
        if "/gated" in name:
            self.refuse(403, "GatedRepo")
        else:
            self.send_json({})

    def _tree(self, name, folder):
        root, folder = self.root / name, folder or ""
        if not (root / folder).is_dir():
            self.refuse(404, "EntryNotFound")
            return
        recursive = self.query.get("recursive", [""])[0].lower() == "true"
        self.send_json(
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
            self.refuse(404, "EntryNotFound")
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{len(content)}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        self.send_content(content, headers)


def serving(root: Path):
    """Serves data sets for the length of a block."""
    return DataSetHub(root).running()
