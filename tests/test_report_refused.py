"""What a report refuses: outputs that are something else, and damaged or foreign records."""

from __future__ import annotations

import json
import re
import sys

import pytest

from reap_stream.cli import main
from reap_stream.reporting import arguments
from reap_stream.scoring.choosing import choose_experts
from reap_stream.scoring.saliency import METHODS
from reap_stream.scoring.scores_file import save_scores
from reap_stream.settings import ChoiceSettings
from tests.reports import make_scores, write_evaluation, write_pruned

pytest.importorskip("matplotlib")

LAYERS, EXPERTS, KEEP = range(2, 5), 8, 4


@pytest.fixture
def scores():
    return make_scores(LAYERS, EXPERTS)


@pytest.fixture
def pruned(scores, tmp_path):
    kept = choose_experts(
        scores.layers, scores.sources, KEEP, ChoiceSettings(), groups=1, num_layers=5
    )
    return write_pruned(tmp_path / "pruned", scores, kept)


def refused(capsys, *command):
    """The message with which a command is refused before anything is written."""
    assert main(["report", *map(str, command)]) == 2
    return capsys.readouterr().err


KEPT = {"num_experts": EXPERTS, "kept": {str(i): [0, 1, 2, 3] for i in LAYERS}}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "a JSON object is expected"),
        ({}, "num_experts None"),
        ({**KEPT, "num_experts": 9}, "num_experts 9.*8 experts in 3 layers"),
        ({**KEPT, "kept": [1]}, r"kept \[1\]"),
        ({**KEPT, "kept": {"2": [0]}}, "layer 3 has scores and no kept experts"),
        ({**KEPT, "kept": {**KEPT["kept"], "3": "0"}}, "layer 3: different experts"),
        ({**KEPT, "kept": {**KEPT["kept"], "3": []}}, "layer 3: different experts"),
        ({**KEPT, "kept": {**KEPT["kept"], "3": [0, 0]}}, "layer 3: different experts"),
        ({**KEPT, "kept": {**KEPT["kept"], "3": [0, 8]}}, "from 0 to 7"),
        ({**KEPT, "kept": {**KEPT["kept"], "3": [-1, 2]}}, "from 0 to 7"),
        ({**KEPT, "kept": {**KEPT["kept"], "3": [True, 2]}}, "layer 3: different experts"),
    ],
)
def test_kept_experts_that_cannot_be(record, message, pruned, tmp_path, capsys):
    path = pruned / "reap" / "kept_experts.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    error = refused(capsys, pruned, "--output", tmp_path / "page.html")
    assert "kept_experts.json" in error
    assert re.search(message, error)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"method": "best"}}, "method 'best'"),
        ({"settings": {"seed": -1}}, "seed -1"),
        ({"settings": {"seed": "0"}}, "seed '0'"),
        ({"settings": {"source_weights": [1]}}, "source_weights [1]"),
        ({"settings": {"source_weights": {"tools.jsonl": "2"}}}, "numbers are expected"),
        ({"settings": {"source_weights": {"nobody": 2}}}, "no calibration source 'nobody'"),
        ({"protected": [3]}, "protected [3]"),
        ({"protected": {"3": [99]}}, "layer 3: different experts"),
    ],
)
def test_settings_that_no_run_has(changes, message, pruned, tmp_path, capsys):
    (pruned / "reap" / "run.json").write_text(json.dumps(changes), encoding="utf-8")
    assert message in refused(capsys, pruned, "--output", tmp_path / "page.html")


@pytest.mark.parametrize(
    "changes",
    [{}, {"settings": 3, "source": [], "calibration": "x", "versions": 1, "stages": {"a": {}}}],
)
def test_a_record_without_facts_is_enough(changes, pruned, tmp_path):
    (pruned / "reap" / "run.json").write_text(json.dumps(changes), encoding="utf-8")
    assert main(["report", str(pruned), "--output", str(tmp_path / "page.html")]) == 0
    assert "<h1>pruned</h1>" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 1"),
        ({"candidates": {}}, "is no evaluation"),
        ({"candidates": []}, "an evaluation of nothing"),
        ({"candidates": [3]}, "a candidate with figures is expected, not 3"),
        ({"label": 3}, "label 3"),
        ({"keep": 0}, "keep 0"),
        ({"keep": 2.0}, "keep 2.0"),
        ({"method": None}, "method None"),
        ({"layers": 7}, "a layer's error is expected, not 7"),
        ({"layers": [{"layer": "1"}]}, "a layer's error is expected"),
        ({"all": {"tokens": 5, "loss": "2"}}, "loss is '2'"),
        ({"all": {"tokens": 0}}, "0 tokens"),
        ({"keep": 16}, "has 16 experts in a layer, the scores are of 8"),
    ],
)
def test_evaluations_that_are_none(change, message, pruned, tmp_path, capsys):
    path = write_evaluation(tmp_path / "eval.json", [("a", "", 8, 2.0)])
    document = json.loads(path.read_text(encoding="utf-8"))
    (key,) = change
    (document if key in document else document["candidates"][0]).update(change)
    path.write_text(json.dumps(document), encoding="utf-8")
    output = tmp_path / "page.html"
    assert message in refused(capsys, pruned, "--eval", path, "--output", output)
    assert not output.exists()


def test_an_evaluation_without_finite_figures(pruned, tmp_path):
    path = write_evaluation(tmp_path / "eval.json", [("a", "", 8, 2.0), ("b", "reap", 4, 3.0)])
    document = json.loads(path.read_text(encoding="utf-8"))
    for entry in document["candidates"]:
        entry["all"].update(loss=None, kl=None, top1_agreement=None)
        entry["layers"] = [{"layer": 0, "relative_error": None}]
    path.write_text(json.dumps(document), encoding="utf-8")
    output = tmp_path / "page.html"
    assert main(["report", str(pruned), "--eval", str(path), "--output", str(output)]) == 0
    assert "<td>–</td>" in output.read_text(encoding="utf-8")
    assert not (tmp_path / "page-loss.png").exists()


def test_what_is_there_is_replaced_only_if_it_is_a_report(pruned, tmp_path, capsys):
    output, picture = tmp_path / "page.html", tmp_path / "page-scores.png"
    command = [pruned, "--output", output]
    output.write_text("my page", encoding="utf-8")
    assert "exists already" in refused(capsys, *command)
    assert "is no part of a report" in refused(capsys, *command, "--overwrite")
    output.unlink()
    picture.write_bytes(b"my picture")
    assert "page-scores.png: exists already" in refused(capsys, *command)
    assert "is no part of a report" in refused(capsys, *command, "--overwrite")
    assert picture.read_bytes() == b"my picture"
    picture.unlink()
    assert main(["report", *map(str, command)]) == 0
    first = output.read_bytes(), picture.read_bytes()
    assert main(["report", *map(str, command), "--overwrite"]) == 0
    assert (output.read_bytes(), picture.read_bytes()) == first


def test_outputs_that_cannot_be(pruned, tmp_path, capsys):
    assert "there is no directory" in refused(
        capsys, pruned, "--output", tmp_path / "no" / "a.html"
    )
    assert "ends in .html" in refused(capsys, pruned, "--output", tmp_path / "page.pdf")
    (tmp_path / "folder.html").mkdir()
    command = [pruned, "--output", tmp_path / "folder.html", "--overwrite"]
    assert "is no part of a report" in refused(capsys, *command)


def test_subjects_that_are_none(pruned, scores, tmp_path, capsys):
    output = ["--output", tmp_path / "page.html"]
    save_scores(tmp_path / "scores.safetensors", scores)
    assert "give one of the targets in it, pruned" in refused(capsys, tmp_path, *output)
    assert "give a pruned checkpoint or" in refused(capsys, tmp_path / "nothing", *output)
    (tmp_path / "empty").mkdir()
    assert "no checkpoint that reap-stream pruned" in refused(capsys, tmp_path / "empty", *output)
    assert "--keep is of a file of scores" in refused(capsys, pruned, "--keep", 4, *output)
    file = tmp_path / "scores.safetensors"
    assert "give one --sparsity or --keep" in refused(capsys, file, "--keep", "4,6", *output)
    assert "cannot keep 9 of 8" in refused(capsys, file, "--keep", 9, *output)
    (tmp_path / "text").write_text("hello", encoding="utf-8")
    assert "not a scores file" in refused(capsys, tmp_path / "text", *output)


def test_the_criteria_are_those_there_are():
    assert arguments._METHODS == METHODS


def test_without_matplotlib_there_is_a_hint(pruned, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = refused(capsys, pruned, "--output", tmp_path / "page.html")
    assert 'pip install "reap-stream[report]"' in message
