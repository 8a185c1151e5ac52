"""Every family with experts that transformers has is tested or refused, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from reap_stream.errors import UnsupportedError
from tests.builders import save, tiny_config, tiny_model, write_checkpoint
from tests.engine import prune_to
from tests.families import BY_ID, LISTED
from tests.moe_types import moe_types
from tests.refused_families import REFUSED, REFUSED_BY_ID

CONSTRAINTS = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8")
PINNED = Version(next(re.finditer(r"^transformers==(.+)$", CONSTRAINTS, re.MULTILINE))[1])

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < PINNED, reason="an older transformers has fewer families"
)


@pytest.fixture(scope="module")
def known():
    return moe_types()


def test_every_family_is_tested_or_refused(known):
    undecided = sorted(known.keys() - BY_ID.keys() - REFUSED_BY_ID.keys())
    assert undecided == [], (
        "transformers has families with experts that no test knows: add each to a list of "
        "FAMILIES, or to REFUSED with the reason"
    )


def test_every_family_of_the_tests_is_one_of_transformers(known):
    # What takes any language model has experts where its text part is of a family that has.
    wrappers = {family.id for family in LISTED if family.values.get("model_type") in known}
    listed = {family.id for family in LISTED} | REFUSED_BY_ID.keys()
    assert sorted(listed - known.keys() - wrappers) == []


def test_no_family_is_both_tested_and_refused():
    assert sorted(BY_ID.keys() & REFUSED_BY_ID.keys()) == []


def test_fifty_families_are_supported():
    assert len(BY_ID) >= 50


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "granite", "bert", "llava"])
def test_a_family_without_experts_is_none_of_them(name, known):
    assert name not in known


def tiny_checkpoint(refused, directory):
    """Of what transformers cannot build, the config and a tensor."""
    if refused.buildable:
        return save(tiny_model(refused.family), directory)
    tensors = {"model.embed_tokens.weight": torch.zeros(96, 32)}
    return write_checkpoint(directory, tensors, tiny_config(refused.family).to_dict())


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.family.id)
def test_a_refused_family_is_refused_with_the_reason(refused, calibration, tmp_path):
    source = tiny_checkpoint(refused, tmp_path / "source")
    with pytest.raises(UnsupportedError, match=refused.message):
        prune_to(tmp_path / "pruned", source, calibration)
    assert sorted(tmp_path.iterdir()) == [source]
