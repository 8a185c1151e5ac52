"""Writes the figures of docs/memory.md: what `plan` says of the configs in docs/configs.

python docs/generate_memory.py

Each part of the page between `<!-- NAME: begin` and `<!-- NAME: end` is made anew. So that the
figures are the same on every machine, the process itself is counted with a fixed amount of memory.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch

from reap_stream.demands import Demands
from reap_stream.inspection import ModelFacts, model_facts
from reap_stream.memory import BudgetError, MemoryPlan, plan_memory
from reap_stream.model.described import open_or_describe
from reap_stream.model.wiring import read_handover
from reap_stream.mtp_choice import choose_mtp
from reap_stream.planning import plan_pruning
from reap_stream.preparation import demands_of
from reap_stream.resident import enough_gib, gib
from reap_stream.settings import OutputSettings, RunSettings
from reap_stream.tables import plan_text

DOCS: Final = Path(__file__).resolve().parent
PAGE: Final = DOCS / "memory.md"
GIB: Final = 2**30
PROCESS_NBYTES: Final = 4 * GIB // 10
# In the order of the table; the plan of the last one takes longest.
MODELS: Final = (
    "gpt-oss-120b", "Qwen3-30B-A3B", "Qwen3-235B-A22B", "GLM-4.6-FP8", "GLM-4.6", "DeepSeek-V3"
)  # fmt: skip
EXAMPLE: Final = "GLM-4.6-FP8"
ROW: Final = 2048
TOKENS: Final = 512 * ROW
CPU: Final = torch.device("cpu")


class Model:
    """One of the models: what it is and what its layers take."""

    def __init__(self, name: str) -> None:
        described = open_or_describe(DOCS / "configs" / name, dtype=torch.bfloat16)
        model = described.model
        handover = read_handover(model.architecture, CPU, ROW)
        head = choose_mtp(model, None, CPU).head
        self.name = name
        self.facts: ModelFacts = model_facts(described)
        self.token_nbytes = handover.token_nbytes
        self.demands: Demands = demands_of(model, handover, longest_row=ROW, head=head)

    def plan(self, budget: int, tokens: int = TOKENS, **options: Any) -> MemoryPlan:
        """How the memory of a pass would be divided."""
        settings = {"batch_tokens": None, "device": CPU, **options}
        return plan_memory(
            self.demands, hidden_nbytes=tokens * self.token_nbytes, budget=budget, **settings
        )

    def least(self, **options: Any) -> int:
        """The smallest budget that is not refused, in bytes."""
        try:
            self.plan(1, **options)
        except BudgetError as error:
            return error.least
        message = f"{self.name}: fits into one byte"
        raise AssertionError(message)


@cache
def model_of(name: str) -> Model:
    """The model of that name, read once."""
    return Model(name)


@contextmanager
def one_process() -> Iterator[None]:
    """Plans are those of a process that holds `PROCESS_NBYTES`."""
    with mock.patch("reap_stream.memory.resident_nbytes", return_value=PROCESS_NBYTES):
        yield


@contextmanager
def one_gpu(free: int) -> Iterator[None]:
    """There seems to be a GPU with that many bytes free."""
    with mock.patch("torch.cuda.mem_get_info", return_value=(free, free)):
        yield


def plan_example() -> str:
    """What `plan` prints for GLM-4.6 in bfloat16."""
    run = RunSettings(
        model=DOCS / "configs" / "GLM-4.6",
        calibration=("builtin",),
        memory=16 * GIB,
        device="cpu",
        compute_dtype="bfloat16",
    )
    text = plan_text(plan_pruning(run, OutputSettings(output=Path(), sparsity="0.25,0.4")))
    return f"```text\n{text}\n```\n"


def model_row(name: str) -> str:
    """A model's row in the table of models."""
    model = model_of(name)
    facts, most = model.facts, model.plan(2**50)
    return _row(
        f"[{name}](configs/{name}/config.json)",
        f"{facts.total_parameters / 1e9:.1f} B",
        f"{facts.bytes / 1e9:.1f} GB",
        f"{facts.largest_layer_bytes / 1e9:.2f} GB",
        gib(most.hidden_nbytes),
        enough_gib(model.least()),
        gib(most.peak_host),
    )


def models_table() -> str:
    """All models."""
    head = (
        "model", "parameters", "on disk", "largest layer", "hidden states", "least `--memory`",
        "most it uses",
    )  # fmt: skip
    return _table(head, [model_row(name) for name in MODELS])


def budgets_table() -> str:
    """What a larger budget buys."""
    model = model_of(EXAMPLE)
    rows = []
    for budget in (2, 3, 4, 5, 6, 16, 24, 32):
        plan = model.plan(budget * GIB)
        where = "file" if plan.spill else "memory"
        slots = f"{plan.expert_slots} of {model.facts.num_experts}"
        rows.append(_row(f"{budget} GiB", plan.batch_tokens, slots, where, gib(plan.peak_host)))
    return _table(("`--memory`", "tokens a batch", "experts held", "hidden states", "peak"), rows)


def tokens_table() -> str:
    """What more calibration text takes."""
    model = model_of(EXAMPLE)
    rows = []
    for samples in (64, 128, 512, 2048, 8192):
        hidden = samples * ROW * model.token_nbytes
        rows.append(_row(f"{samples:,}", f"{samples * ROW:,}", gib(hidden), gib(3 * hidden)))
    return _table(("rows of 2,048", "tokens", "hidden states", "on disk, where in a file"), rows)


def batches_table() -> str:
    """What larger batches take."""
    model = model_of(EXAMPLE)
    rows = [
        _row(f"{tokens:,}", enough_gib(model.least(batch_tokens=tokens)))
        for tokens in (2048, 4096, 8192, 16384)
    ]
    return _table(("`--batch-tokens`", "least `--memory`"), rows)


def devices_table() -> str:
    """What goes onto a GPU."""
    rows = []
    for name in MODELS:
        model = model_of(name)
        cells = []
        for free in (24, 80):
            with one_gpu(free * GIB):
                plan = model.plan(2**50, device=torch.device("cuda"))
            cells += [gib(plan.peak_device), "all" if plan.grouped else "one by one"]
        rows.append(_row(name, *cells))
    head = ("model", "24 GiB free: peak", "experts decoded", "80 GiB free: peak", "experts decoded")
    return _table(head, rows)


PARTS: Final[Mapping[str, Callable[[], str]]] = {
    "plan": plan_example,
    "models": models_table,
    "budgets": budgets_table,
    "tokens": tokens_table,
    "batches": batches_table,
    "devices": devices_table,
}


def shown(page: str, name: str) -> str:
    """A generated part as it stands on the page."""
    ((_, text, _),) = re.findall(_pattern(name), page, re.DOTALL)
    return str(text)


def made(name: str) -> str:
    """A generated part as it should be."""
    with one_process():
        return f"\n{PARTS[name]()}\n"


def memory_page(page: str) -> str:
    """The page with all its parts made anew."""
    for name in PARTS:
        text = made(name)
        page = re.sub(_pattern(name), rf"\1{text}\3", page, flags=re.DOTALL)
    return page


def _pattern(name: str) -> str:
    return rf"(<!-- {name}: begin[^>]*-->\n)(.*?)(<!-- {name}: end -->)"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    return _row(*head) + "|---" * len(head) + "|\n" + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(memory_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE.name} written\n")
