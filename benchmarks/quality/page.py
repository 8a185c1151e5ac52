"""docs/quality.md from its template and the figures."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from quality.study import FOLDS, ROW_TOKENS, SIZES
from quality.wrapping import wrapped
from reap_stream.checkpoint.source import has_weights, open_checkpoint

QUESTIONS = (
    "sparsity",
    "calibration",
    "token_counts",
    "quantising",
    "propagation",
    "super_experts",
    "loops",
    "parity",
)
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TEMPLATE = HERE / "template.md"
PAGE = HERE.parents[1] / "docs" / "quality.md"

MODEL = HERE.parents[1] / "reap_stream" / "demo" / "model"
DRAFT = """
**Draft.** Figures below are of another state of the model than the one that ships, or of less text
than described: run `python benchmarks/quality/run.py all …` and `render`.
"""

_FIELD = re.compile(r"\{\{(\w+)\.(\w+)\}\}")


def render(results: Path = RESULTS) -> str:
    """The page's text.

    Args:
        results: directory with a JSON file for each question.

    Raises:
        KeyError: the template names a figure that there is not.
    """
    found = {name: json.loads((results / f"{name}.json").read_text()) for name in QUESTIONS}
    check_same_model(found)
    texts = {
        name: import_module(f"quality.questions.{name}").fields(result)
        for name, result in found.items()
    }
    texts["study"] = {
        "minutes": f"{sum(r['seconds'] for r in found.values()) / 60:.0f}",
        "folds": str(FOLDS),
        "row_tokens": str(ROW_TOKENS),
        "draft": "" if is_final(found, shipped_model()) else DRAFT,
    }
    return wrapped(filled(TEMPLATE.read_text(), texts))


def shipped_model() -> str | None:
    """The fingerprint of the demo's model; None where there is none."""
    return open_checkpoint(MODEL).fingerprint if has_weights(MODEL) else None


def is_final(found: dict[str, dict[str, Any]], model: str | None) -> bool:
    """Whether all figures are of this model and of as much text as the page says."""
    made = [result["made_from"] for result in found.values()]
    return all(m["model"] == model and m.get("sizes") == SIZES for m in made)


def check_same_model(found: dict[str, dict[str, Any]]) -> None:
    """Refuses to put figures of different models on one page."""
    models = {tuple(r["made_from"][key] for key in ("model", "tokens")) for r in found.values()}
    if len(models) > 1:
        message = f"the results are of {len(models)} different models or texts: measure all again"
        raise ValueError(message)


def filled(template: str, texts: dict[str, dict[str, str]]) -> str:
    """The template with every ``{{question.field}}`` replaced."""
    return _FIELD.sub(lambda match: texts[match[1]][match[2]], template)
