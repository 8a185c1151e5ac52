"""Prune Mixture-of-Experts checkpoints layer by layer, straight from disk, with bounded memory.

    import reap_stream as rs

    run = rs.RunSettings(model=Path("GLM-4.6-FP8"), calibration=("calibration.jsonl:512",))
    rs.prune(run, rs.OutputSettings(output=Path("pruned"), sparsity="0.4"))

Names are resolved on first use, so importing the package costs nothing and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reap_stream.compaction import compact
    from reap_stream.errors import ReapStreamError
    from reap_stream.evaluating import evaluate
    from reap_stream.evaluation.document import Evaluation
    from reap_stream.pipeline import observe, prune
    from reap_stream.records import Summary
    from reap_stream.settings import (
        Candidate,
        ChoiceSettings,
        EvalSettings,
        OutputSettings,
        RunSettings,
    )

__version__ = "0.1.0"

_HOMES = {
    "Candidate": "reap_stream.settings",
    "ChoiceSettings": "reap_stream.settings",
    "EvalSettings": "reap_stream.settings",
    "Evaluation": "reap_stream.evaluation.document",
    "OutputSettings": "reap_stream.settings",
    "ReapStreamError": "reap_stream.errors",
    "RunSettings": "reap_stream.settings",
    "Summary": "reap_stream.records",
    "compact": "reap_stream.compaction",
    "evaluate": "reap_stream.evaluating",
    "observe": "reap_stream.pipeline",
    "prune": "reap_stream.pipeline",
}

__all__ = [
    "Candidate",
    "ChoiceSettings",
    "EvalSettings",
    "Evaluation",
    "OutputSettings",
    "ReapStreamError",
    "RunSettings",
    "Summary",
    "__version__",
    "compact",
    "evaluate",
    "observe",
    "prune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(_HOMES[name]), name)
