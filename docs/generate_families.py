"""Writes docs/families.md, what the tests prune and what is refused, from the tests.

python docs/generate_families.py > docs/families.md
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers.models.auto import modeling_auto

from tests.families import FAMILIES
from tests.family import Family
from tests.refused_families import REFUSED

_MAPPINGS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
_HEAD = """# Model families

Nearly no family needs code of its own: layers, experts and routers are found in transformers' model
class. The tests know every model type of transformers that builds a language model with experts.
They build a tiny random checkpoint of each family below, run it streamed and whole, prune it, and
load the result with transformers; of a vision-language or omni model the text decoder is pruned.
`reap-stream inspect MODEL` says, from config.json alone, what it makes of a model.

A type that takes any language model (`llava`, `internvl` and their like) is what its text part is.

This page is made by `docs/generate_families.py` from the lists of the tests.

## Pruned: {count}

| `model_type` in config.json | class in transformers |
|---|---|
"""
_REFUSED = """
## Refused

Such a model is refused before any work, with a message that says what was found.

| `model_type` in config.json | why |
|---|---|
"""


def families_page() -> str:
    """The text of docs/families.md."""
    pruned = sorted((family.id, _class_name(family)) for family in FAMILIES)
    refused = sorted((entry.family.id, entry.reason) for entry in REFUSED)
    rows = "".join(f"| `{kind}` | `{name}` |\n" for kind, name in pruned)
    reasons = "".join(f"| `{kind}` | {reason} |\n" for kind, reason in refused)
    return _HEAD.format(count=len(pruned)) + rows + _REFUSED + reasons


def _class_name(family: Family) -> str:
    named = getattr(modeling_auto, _MAPPINGS[family.auto])[family.id]
    return named[0] if isinstance(named, tuple) else str(named)


if __name__ == "__main__":
    sys.stdout.write(families_page())
