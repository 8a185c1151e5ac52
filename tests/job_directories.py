"""Jobs, and directories of which a test can tell whether they are whole."""

from __future__ import annotations

from pathlib import Path

from reap_stream.checkpoint.job import Job

SETTINGS = {"keep": [3], "seed": 0, "memory": None, "source": "abc"}


def begin(output, **options):
    return Job.create(output, SETTINGS, **options)


def fill(path: Path, text: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(text)
    (path / "sub").mkdir(exist_ok=True)
    (path / "sub" / "more").write_text(text)


def open_files(directory: Path) -> list[str]:
    """What this process has open below a directory, deleted files too."""
    found = [str(entry.resolve()) for entry in Path("/proc/self/fd").iterdir()]
    return [target for target in found if target.startswith(f"{directory}/")]


def whole(path: Path) -> str | None:
    """What `fill` wrote, if all of it and nothing else is there."""
    if not path.exists():
        return None
    text = (path / "config.json").read_text()
    assert (path / "sub" / "more").read_text() == text
    assert {p.name for p in path.rglob("*")} == {"config.json", "sub", "more"}
    return text
