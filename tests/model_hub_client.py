"""huggingface_hub pointed at a test's own server, with a cache of its own."""

from __future__ import annotations

import time
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from reap_stream.hub import retrying

# Small shards must come in many pieces, as large ones do in pieces of 10 MB.
CHUNK_NBYTES = 1 << 14
RUN_IN_PIECES = (
    "import sys; from huggingface_hub import constants; "
    f"constants.DOWNLOAD_CHUNK_SIZE = {CHUNK_NBYTES}; "
    "from reap_stream.cli import main; sys.exit(main(sys.argv[1:]))"
)


def point_at(monkeypatch: pytest.MonkeyPatch, url: str, cache: object) -> None:
    """Makes the client of this process ask `url` and keep files under `cache`.

    The library reads its environment when it is imported, so its constants are set.
    """
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/no-token")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK_NBYTES)
    monkeypatch.setattr(retrying, "_PAUSE_SECONDS", 0.01)
    close_session()


class _Hasty:
    """The module `time` for those who shall not wait; nobody else's is changed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, _: float) -> None:
        """Returns at once."""


def without_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the waits of huggingface_hub itself; answers to a rate limit are given in seconds."""
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", _Hasty())


def environment(url: str, cache: object, **more: str) -> dict[str, str]:
    """The same for another process."""
    return {
        "HF_ENDPOINT": url,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": f"{cache}/no-token",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }
