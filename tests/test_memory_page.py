"""The figures of docs/memory.md, and of README's plan, are what the code of `plan` says."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.printed import differences
from tests.test_described import GLM_46

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
SMALL = ("gpt-oss-120b", "Qwen3-30B-A3B")
STALE = "run: python docs/generate_memory.py"


@pytest.fixture(scope="module")
def generator():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "generate_memory.py")))


def config(name):
    return json.loads((ROOT / "docs" / "configs" / name / "config.json").read_text("utf-8"))


def test_configs_are_the_models():
    assert {key: config("GLM-4.6")[key] for key in GLM_46} == GLM_46
    quantised = config("GLM-4.6-FP8")
    settings = quantised.pop("quantization_config")
    assert (settings["quant_method"], settings["format"]) == (
        "compressed-tensors",
        "float-quantized",
    )
    assert quantised == config("GLM-4.6")


def test_small_models_have_the_rows_shown(generator):
    table = generator.shown(PAGE, "models")
    with generator.one_process():
        for name in SMALL:
            assert generator.model_row(name) in table, STALE


def test_the_models_table_has_the_sizes_that_their_makers_give(generator):
    """Parameters as published: 116.8, 30.5, 235, 671 billion; DeepSeek-V3 is 688.6 GB."""
    table = generator.shown(PAGE, "models")
    told = dict(re.findall(r"^\| \[([^\]]+)\]\S+ \| ([\d.]+) B", table, re.MULTILINE))
    assert told == {
        "gpt-oss-120b": "116.8", "Qwen3-30B-A3B": "30.5", "Qwen3-235B-A22B": "235.1",
        "GLM-4.6-FP8": "352.8", "GLM-4.6": "352.8", "DeepSeek-V3": "671.0",
    }  # fmt: skip
    assert "| 671.0 B | 688.6 GB |" in table


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plan", "models", "budgets", "tokens", "batches", "devices"])
def test_the_page_is_what_is_generated(name, generator):
    assert generator.shown(PAGE, name) == generator.made(name), STALE


def test_the_readme_shows_the_same_plan():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"reap-stream plan docs/configs.*?```text\n(.*?)```", readme, re.DOTALL)
    (printed,) = re.findall(r"<!-- plan: begin.*?```text\n(.*?)```", PAGE, re.DOTALL)
    assert differences(shown, printed) == []
