"""Writes docs/families.md, the table of model families that the tests prune, from the tests.

python docs/generate_families.py > docs/families.md
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families import FAMILIES

_HEAD = """# Model families

A family needs no code of its own: layers, experts and routers are found in transformers' model
class. The tests build a tiny random checkpoint of each family below, prune it, and load the result
with transformers. Others are tried in the same way and refused with the reason where it fails.
`reap-stream inspect MODEL` says, from config.json alone, which it is.

This table is made by `docs/generate_families.py` from `tests/families.py`.

| `model_type` in config.json | class in transformers |
|---|---|
"""


def families_page() -> str:
    """The text of docs/families.md."""
    rows = {family.id: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.id] for family in FAMILIES}
    return _HEAD + "".join(f"| `{kind}` | `{name}` |\n" for kind, name in sorted(rows.items()))


if __name__ == "__main__":
    sys.stdout.write(families_page())
