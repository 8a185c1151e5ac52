"""What pruning costs on the demo's model: measures one question or all, and writes the page.

    python benchmarks/quality/run.py all --model reap_stream/demo/model --bf16 WORK/bf16 --work WORK --output DIR
    python benchmarks/quality/run.py render [--check]

WORK is the directory that `benchmarks/train_demo.py --work` filled: its tokens are read. DIR takes
scores and pruned checkpoints, and each is made once; figures go to benchmarks/quality/results, from
where `render` makes docs/quality.md. A question that was measured on this model and these tokens is
not measured again, unless --again says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

# Waiting threads sleep, as under the command line; torch reads this when it starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The package is this directory: the one above it is where it is found.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quality.page import PAGE, QUESTIONS, RESULTS, render

_FLAT_LIST = re.compile(r"\[[^\[\]{}]*\]")
# Questions that the bfloat16 model has a part in.
WITH_BF16 = ("quantising", "parity")


def main() -> int:
    """Measures what is asked for."""
    arguments = read_arguments()
    if arguments.question == "render":
        return write_page(arguments.results, check=arguments.check)
    from quality.study import Study

    arguments.results.mkdir(parents=True, exist_ok=True)
    study = Study(arguments.model, arguments.bf16, arguments.work, arguments.output)
    names = QUESTIONS if arguments.question == "all" else (arguments.question,)
    for name in names:
        path = arguments.results / f"{name}.json"
        print(f"\n## {name}\n", flush=True)
        if arguments.again or not is_measured(path, made_from(name, study)):
            save(path, measured(name, study))
        show(name, json.loads(path.read_text()))
    return 0


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("question", choices=(*QUESTIONS, "all", "render"))
    add("--model", type=Path, help="the checkpoint to prune: the demo's, in FP8")
    add("--bf16", type=Path, help="the same model in bfloat16 (quantising, parity)")
    add("--work", type=Path, help="directory that train_demo.py filled: its tokens are read")
    add("--output", type=Path, help="scratch space, 1 GB")
    add("--results", type=Path, default=RESULTS, help="directory of the figures")
    add("--again", action="store_true", help="measure although the figures are there")
    add("--check", action="store_true", help="render: fail if docs/quality.md is another text")
    arguments = parser.parse_args()
    needed = [n for n in ("model", "work", "output") if getattr(arguments, n) is None]
    if arguments.question != "render" and needed:
        parser.error(f"{arguments.question} needs {', '.join('--' + n for n in needed)}")
    if arguments.question in (*WITH_BF16, "all") and arguments.bf16 is None:
        parser.error(f"{arguments.question} compares with the bfloat16 model: give --bf16")
    return arguments


def made_from(name: str, study: Any) -> dict[str, Any]:
    """What a question's figures depend on: they are measured anew when one of these differs."""
    twin = {"bf16": study.twin} if name in WITH_BF16 else {}
    return {**study.made_from, **twin}


def is_measured(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether figures of this model and these tokens are there."""
    return path.exists() and bool(json.loads(path.read_text())["made_from"] == wanted)


def measured(name: str, study: Any) -> dict[str, Any]:
    """The figures of a question, and what they were made from."""
    started = time.monotonic()
    result = import_module(f"quality.questions.{name}").measure(study)
    seconds = round(time.monotonic() - started, 1)
    return {"question": name, "made_from": made_from(name, study), "seconds": seconds, **result}


def save(path: Path, result: dict[str, Any]) -> None:
    """Writes figures, whole or not at all."""
    partial = path.with_suffix(".partial")
    text = json.dumps(_rounded(result), indent=1, ensure_ascii=False)
    partial.write_text(_FLAT_LIST.sub(lambda match: " ".join(match[0].split()), text) + "\n")
    partial.replace(path)


def _rounded(value: Any) -> Any:
    """Floats with seven digits: more than the page shows, less than noise."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def show(name: str, result: dict[str, Any]) -> None:
    """Prints a question's tables and sentences."""
    for text in import_module(f"quality.questions.{name}").fields(result).values():
        print(text, end="\n\n", flush=True)
    print(f"{result['seconds']:.0f} s")


def write_page(results: Path, *, check: bool) -> int:
    """Writes docs/quality.md, or says whether it is what the figures say."""
    text = render(results)
    if not check:
        PAGE.write_text(text)
        return 0
    if PAGE.exists() and PAGE.read_text() == text:
        return 0
    print(f"{PAGE} is not what {results} render to: python benchmarks/quality/run.py render")
    return 1


if __name__ == "__main__":
    sys.exit(main())
