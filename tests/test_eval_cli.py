"""`reap-stream eval` from end to end: what is printed where, and what the files hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from reap_stream.cli import main
from reap_stream.evaluating import evaluate
from reap_stream.evaluation.metrics import Figures
from tests.engine import prune_to
from tests.evaluation import eval_settings, make_scores

RUNNING = ["--compute-dtype", "float32", "--device", "cpu", "--batch-tokens", "72"]


@pytest.fixture
def command(capsys):
    """Runs `eval`; status, standard output, standard error."""

    def run(*arguments):
        status = main(["eval", *map(str, arguments), *RUNNING])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def source(tiny):
    return tiny("glm4_moe")


@pytest.fixture(scope="module")
def scores(source, tmp_path_factory):
    return make_scores(source, tmp_path_factory.mktemp("scores") / "scores.safetensors")


def of(specs):
    return [item for spec in specs for item in ("--text", spec)]


def strictly(text):
    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_json_holds_everything_and_nothing_else_is_printed(
    command, source, scores, calibration, tmp_path
):
    pruned = prune_to(tmp_path / "pruned", source, calibration, 4)
    targets = ["--scores", scores, "--sparsity", "0.25,0.5", "--method", "reap,random", "--seed", 3]
    status, out, err = command(source, pruned, *targets, *of(calibration), "--json")
    assert (status, err) == (0, "")
    found = strictly(out)
    assert found["format_version"] == 1
    assert found["text"]["sources"] == list(calibration)
    assert (found["text"]["rows"], found["text"]["tokens"]) == (8, 156)
    assert found["peak_resident_nbytes"] > 0
    labels = ["reap keep 6", "reap keep 4", "random seed 3 keep 6", "random seed 3 keep 4"]
    candidates = found["candidates"]
    assert [entry["label"] for entry in candidates] == [source.name, "pruned", *labels]
    assert [entry.get("method") for entry in candidates] == [None] * 2 + ["reap"] * 2 + [
        "random"
    ] * 2
    assert [entry["keep"] for entry in candidates] == [8, 4, 6, 4, 6, 4]
    assert [entry["model"] for entry in candidates] == [str(source), str(pruned)] + [
        str(source)
    ] * 4
    for entry in candidates:
        figures = [entry["all"], *entry["sources"].values()]
        assert list(entry["sources"]) == list(calibration)
        for own in figures:
            assert set(own) == {"tokens", "loss", "perplexity", "kl", "top1_agreement"}
        tokens = [own["tokens"] for own in entry["sources"].values()]
        assert sum(tokens) == entry["all"]["tokens"] == 148
        mean = np.average([own["loss"] for own in entry["sources"].values()], weights=tokens)
        assert math.isclose(entry["all"]["loss"], mean)
    assert candidates[0]["layers"] == []
    assert [entry["layer"] for entry in candidates[1]["layers"]] == [0, 1, 2]
    assert candidates[2]["scores"] == str(scores)


def test_the_table_shows_the_figures(command, source, scores, calibration):
    status, out, err = command(source, "--scores", scores, "--keep", "4", *of(calibration))
    assert (status, err) == (0, "")
    settings = eval_settings([source], calibration)
    loss = evaluate(settings).results[0].all.loss
    blocks = out.split("\n\n")
    assert blocks[0].splitlines()[1].split() == ["layer", "reap", "keep", "4"]
    assert [block.splitlines()[0] for block in blocks[1:5]] == [
        *(
            f"{spec} ({count} tokens predicted)"
            for spec, count in zip(calibration, (92, 48, 8), strict=True)
        ),
        "all (148 tokens predicted)",
    ]
    assert f"{loss:.4f}" in blocks[4].splitlines()[2]
    assert "peak memory" in blocks[5]


def test_one_text_is_shown_once(command, source, calibration):
    status, out, _ = command(source, "--text", calibration[0])
    assert status == 0
    assert out.startswith(f"{calibration[0]} (92 tokens predicted)")
    assert out.count("tokens predicted") == 1


def test_the_file_is_the_json_and_is_not_overwritten(command, source, calibration, tmp_path):
    path = tmp_path / "result.json"
    arguments = [source, *of(calibration), "--output", path]
    assert command(*arguments)[0] == 0
    first = strictly(path.read_text(encoding="utf-8"))
    assert first["candidates"][0]["all"]["tokens"] == 148
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert "exists already" in err
    assert command(*arguments, "--overwrite")[0] == 0
    assert strictly(path.read_text(encoding="utf-8"))["candidates"] == first["candidates"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "folder"])
def test_what_is_no_evaluation_is_not_overwritten(name, command, source, calibration, tmp_path):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    else:
        path.write_bytes((source / name).read_bytes())
    status, _, err = command(source, *of(calibration), "--output", path, "--overwrite")
    assert status == 2
    assert "holds no evaluation" in err
    assert path.is_dir() or path.read_bytes() == (source / name).read_bytes()


REFUSED = [
    (["--sparsity", "0.5"], "need --scores"),
    (["--scores", "{scores}"], "either --sparsity or --keep"),
    (["--scores", "{scores}", "--keep", "4", "--method", "reap,best"], "--method best"),
    (["--scores", "{scores}", "--keep", "four"], "'four'"),
    (["--scores", "{scores}", "--keep", "9"], "cannot keep 9 of 8"),
    (["--output", "{missing}/result.json"], "there is no directory"),
    (["--source-weights", "other=2", "--scores", "{scores}", "--keep", "4"], "'other'"),
    (["--text", "missing.npy"], "missing.npy"),
    (["--memory", "1MiB"], "memory budget"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_is_refused_is_refused_with_2(
    arguments, message, command, source, scores, calibration, tmp_path
):
    places = {"scores": scores, "missing": tmp_path / "missing"}
    given = [argument.format(**places) for argument in arguments]
    status, out, err = command(source, *of(calibration), *given)
    assert (status, out) == (2, "")
    assert message in err


def test_figures_that_are_no_numbers_are_null_and_noted(source, calibration):
    evaluation = evaluate(eval_settings([source], calibration))
    (result,) = evaluation.results
    endless = Figures(3, math.inf, math.inf, math.nan, 0.5)
    result = replace(result, all=endless, layers={0: math.nan, 1: 0.5})
    document = replace(evaluation, results=(result,)).document()
    found = strictly(json.dumps(document))
    (candidate,) = found["candidates"]
    assert candidate["all"] == {
        "tokens": 3, "loss": None, "perplexity": None, "kl": None, "top1_agreement": 0.5,
    }  # fmt: skip
    assert candidate["layers"][0] == {"layer": 0, "relative_error": None}
    assert any("all: not all figures are finite" in note for note in found["notes"])
    assert any("no relative error of layers [0]" in note for note in found["notes"])


def test_the_package_offers_it(source, calibration):
    import reap_stream

    settings = reap_stream.EvalSettings(
        models=(source,), text=tuple(calibration), compute_dtype="float32", progress=False
    )
    found = reap_stream.evaluate(settings)
    assert isinstance(found, reap_stream.Evaluation)
    assert "all (148 tokens predicted)" in found.table()


@pytest.mark.parametrize(
    "option", [("--method", "ean"), ("--source-weights", "a=2"), ("--protect", "super")]
)
def test_choices_without_scores_are_refused(option, command, source, calibration):
    status, out, err = command(source, *of(calibration), *option)
    assert (status, out) == (2, "")
    assert f"{option[0]} says how experts are chosen from scores, and no scores are given" in err
