"""The demo on the weights that ship: what it prints, and that it is true."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

import reap_stream
from reap_stream import commands
from reap_stream.cli import main
from reap_stream.demo.data import HELD_OUT, MODEL, training_record
from reap_stream.demo.result import introduction
from reap_stream.demo.running import EVALUATION, PRUNED, DemoSettings, run_demo
from reap_stream.evaluating import evaluate
from reap_stream.pruning import SCORES_FILE
from reap_stream.settings import Candidate, ChoiceSettings, EvalSettings
from reap_stream.verifying import verify_directory

DOMAINS = ("python", "prose", "tools")
SMALL = DemoSettings(sparsities=("0.25", "0.5"), calibration_rows=24, held_out_rows=6)
ROW = 512


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "out"
    return directory, run_demo(directory, SMALL)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The first rows of each domain's held-out text, as files."""
    directory = tmp_path_factory.mktemp("few")
    files = {}
    for domain, path in HELD_OUT.items():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        files[domain] = directory / path.name
        files[domain].write_text("".join(lines[:8]), encoding="utf-8")
    return files


def token_rows(tokenizer, path):
    rows = []
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        text = record.get("text")
        if text is None:
            text = tokenizer.apply_chat_template(
                record["messages"], tools=record["tools"], tokenize=False
            )
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"][:ROW])
    return rows


def decoded(directory):
    """A checkpoint as transformers decodes it, to bfloat16; run in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=FineGrainedFP8Config(dequantize=True), local_files_only=True
    )
    return model.float().eval()


def loss_of(model, rows):
    """Mean loss of transformers' own forward, each row alone."""
    total = count = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            logits = model(ids[:, :-1], use_cache=False).logits[0]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += len(row) - 1
    return total / count


def evaluated(files, *candidates, models=(MODEL,)):
    settings = EvalSettings(
        models=models,
        text=tuple(str(path) for path in files.values()),
        candidates=candidates,
        samples=None,
        sequence_length=ROW,
        device="cpu",
        compute_dtype="float32",
        progress=False,
    )
    return evaluate(settings).document()["candidates"]


@pytest.mark.slow
def test_the_record_of_the_training_tells_the_loss_on_all_that_ships():
    told = training_record()["shipped"]
    (found,) = evaluated(HELD_OUT)
    for domain, path in HELD_OUT.items():
        entry = found["sources"][str(path)]
        assert entry["tokens"] == told[domain]["tokens"]
        assert entry["loss"] == pytest.approx(told[domain]["model"], abs=3e-3)
        assert told[domain]["model"] < 0.95 * told[domain]["bigram"]


def test_pruned_checkpoints_stay_and_hold_the_sources_bytes(finished):
    directory, result = finished
    pruned = [directory / PRUNED / f"keep-{keep}" for keep in (24, 16)]
    assert sorted(path.name for path in directory.iterdir()) == sorted([EVALUATION, PRUNED])
    reports = [verify_directory(path, MODEL) for path in pruned]
    assert sum(report.tensors for report in reports) == result.tensors
    for path, row in zip(pruned, result.rows[1:], strict=False):
        shards = {n: t for p in path.glob("*.safetensors") for n, t in load_file(p).items()}
        counted = sum(
            math.prod(tensor.shape)
            for name, tensor in shards.items()
            if not name.endswith(("weight_scale_inv", "e_score_correction_bias"))
        )
        assert row.parameters == counted
        assert row.nbytes == sum(p.stat().st_size for p in path.glob("*.safetensors"))


def test_evaluation_is_transformers_own_loss(finished, few, tokenizer):
    directory, _ = finished
    told = training_record()["shipped"]
    models = (MODEL, directory / PRUNED / "keep-16")
    for path, found in zip(models, evaluated(few, models=models), strict=True):
        model = decoded(path)
        for domain, text in few.items():
            entry, rows = found["sources"][str(text)], token_rows(tokenizer, text)
            assert entry["tokens"] == sum(len(row) - 1 for row in rows)
            # transformers rounds the decoded weights to bfloat16.
            assert entry["loss"] == pytest.approx(loss_of(model, rows), abs=3e-3)
            assert path != MODEL or entry["loss"] < told[domain]["bigram"]
            assert entry["loss"] < 0.75 * told[domain]["unigram"]


def test_rows_are_the_evaluations(finished):
    directory, result = finished
    document = json.loads((directory / EVALUATION).read_bytes())
    assert [row.experts for row in result.rows] == [32, 24, 16, 16]
    for row, entry in zip(result.rows, document["candidates"], strict=True):
        assert row.kl == entry["all"]["kl"]
        assert list(row.losses) == list(DOMAINS)
        assert row.losses["prose"] == entry["sources"][str(HELD_OUT["prose"])]["loss"]
    assert result.evaluated_tokens == document["text"]["tokens"]
    original = result.rows[0]
    assert (original.kl, original.top1) == (0, 1)
    assert original.nbytes == sum(p.stat().st_size for p in MODEL.glob("*.safetensors"))


def test_more_pruning_costs_more_and_chance_costs_most(finished):
    _, result = finished
    _, quarter, half, chance = result.rows
    assert 0 < quarter.kl < half.kl < chance.kl
    assert quarter.top1 > half.top1 > chance.top1


def test_scores_lose_less_than_chance_at_a_quarter(finished, few):
    directory, _ = finished
    scores = directory / PRUNED / "keep-24" / SCORES_FILE
    choices = [ChoiceSettings("reap"), *(ChoiceSettings("random", seed) for seed in range(2))]
    candidates = [Candidate(scores=scores, keep=24, choice=c, label=str(c)) for c in choices]
    original, chosen, *by_chance = evaluated(few, *candidates)
    lost = chosen["all"]["loss"] - original["all"]["loss"]
    lost_by_chance = [entry["all"]["loss"] - original["all"]["loss"] for entry in by_chance]
    assert lost < 0.8 * np.mean(lost_by_chance)
    assert chosen["all"]["kl"] < 0.8 * np.mean([entry["all"]["kl"] for entry in by_chance])


def test_table_names_every_figure(finished):
    _, result = finished
    lines = result.table().splitlines()
    assert lines[1].startswith("original")
    assert lines[2].startswith("sparsity 0.25")
    assert lines[4].startswith("0.5 by chance")
    for row, line in zip(result.rows, lines[1:5], strict=True):
        assert f"{row.parameters:,}" in line
        assert all(f"{loss:.3f}" in line for loss in row.losses.values())
    assert f"{result.tensors:,} tensors" in result.table()


def test_the_command_says_what_it_does_and_where(finished, monkeypatch, capsys):
    directory, result = finished
    monkeypatch.setattr(commands, "run_demo", lambda _: result)
    assert main(["demo", "--output", str(directory)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(introduction(training_record()))
    assert result.table() in printed
    assert f"{directory / PRUNED}, {directory / EVALUATION}" in printed


def test_nothing_stays_without_an_output_and_the_package_is_not_written(tmp_path, monkeypatch):
    package = Path(reap_stream.__file__).parent
    before = {path: path.stat().st_mtime_ns for path in (package / "demo").rglob("*.*")}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_demo(None, DemoSettings(sparsities=("0.5",), calibration_rows=2, held_out_rows=1))
    assert list(tmp_path.iterdir()) == []
    after = {path: path.stat().st_mtime_ns for path in (package / "demo").rglob("*.*")}
    assert {p for p in before.keys() ^ after.keys() if p.suffix != ".pyc"} == set()
    assert all(after[path] == time for path, time in before.items() if path.suffix != ".pyc")


def test_an_existing_output_is_refused(tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_the_readme_shows_what_the_demo_prints():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
    printed = run_demo(None).table().splitlines()
    assert [
        line for line in introduction(training_record()).splitlines() if line not in readme
    ] == []
    head, rows, facts = printed[0], printed[1:6], printed[7:]
    shown = readme[readme.index(head) + 1 :][: len(rows)]
    for mine, theirs in zip(rows, shown, strict=True):
        # Losses differ in the last digits between machines.
        assert mine[:50] == theirs[:50]
        figures = [
            [float(f) for f in line[50:].replace("%", "").split()] for line in (mine, theirs)
        ]
        np.testing.assert_allclose(*figures, rtol=0.02, atol=0.01)
    varying = ("calibration", "seconds", "peak memory")
    assert [line for line in facts if not line.startswith(varying) and line not in readme] == []
