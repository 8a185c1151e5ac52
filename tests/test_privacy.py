"""What others may read of a checkpoint names no directory of the machine that made it."""

from __future__ import annotations

import json
import shutil

import pytest

from reap_stream.card.privacy import Shortener, is_path, of_evaluation, of_run
from reap_stream.cli import main
from reap_stream.scoring.scores_file import load_scores, save_scores
from tests.engine import prune_to, run_record

KEEP = "4"


@pytest.fixture(scope="module")
def job(tiny, calibration, tmp_path_factory):
    """A checkpoint cut with data of equal names in two places, and evaluated."""
    home = tmp_path_factory.mktemp("private-home")
    source = shutil.copytree(tiny("glm4_moe"), home / "Tiny-MoE")
    specs = []
    for folder, spec in zip(("alice", "bob"), calibration, strict=False):
        (home / folder).mkdir()
        specs.append(str(shutil.copy(spec, home / folder / "rows.npy")))
    output = prune_to(
        home / "pruned", source, specs, KEEP, source_weights=((specs[1], 2.5),), protect="super"
    )
    found = home / "found.json"
    words = ["eval", source, output, "--text", specs[0], "--text", specs[1], "--output", found]
    assert main([*map(str, words), "--device", "cpu"]) == 0
    assert main(["card", str(output), "--eval", str(found)]) == 0
    return home, source, output, specs


def names_in(directory, path):
    """Files that hold a path."""
    files = (file for file in directory.rglob("*") if file.is_file())
    return [file.name for file in files if str(path).encode() in file.read_bytes()]


def test_no_file_names_a_directory(job):
    home, source, output, _ = job
    assert names_in(output, home) == []
    run = run_record(output)
    assert run["settings"]["model"] == run["source"]["path"] == source.name
    labels = ["1/rows.npy", "2/rows.npy"]
    assert run["calibration"]["sources"] == run["settings"]["calibration"] == labels
    assert [origin["name"] for origin in run["calibration"]["origins"]] == labels
    assert run["settings"]["source_weights"] == {"2/rows.npy": 2.5}
    assert load_scores(output / "reap" / "scores.safetensors").sources == tuple(labels)
    evaluation = json.loads((output / "reap" / "eval.json").read_text())
    assert evaluation["text"]["sources"] == labels
    assert [found["model"] for found in evaluation["candidates"]] == [source.name, output.name]
    assert [list(found["sources"]) for found in evaluation["candidates"]] == [labels] * 2


def test_what_reads_the_records_still_does(job, tmp_path):
    """verify, report, and compact with the weights of sources that the record names."""
    home, source, output, _ = job
    assert main(["verify", str(output), "--source", str(source)]) == 0
    assert main(["report", str(output), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "The kept experts are not the ones" not in page
    assert str(home) not in page
    again = tmp_path / "again"
    scores = output / "reap" / "scores.safetensors"
    words = ["compact", source, "--scores", scores, "--output", again, "--keep", KEEP]
    words += ["--source-weights", "2/rows.npy=2.5", "--protect", "super"]
    assert main(list(map(str, words))) == 0
    kept = "reap/kept_experts.json"
    assert (again / kept).read_bytes() == (output / kept).read_bytes()
    assert names_in(again, home) == []


def test_compact_says_what_the_scores_were_taken_on(job, tmp_path):
    """The table of calibration data is the one of the run that scored; so after merge."""
    home, source, output, specs = job
    parts = []
    for number, spec in enumerate(specs):
        parts.append(str(tmp_path / f"{number}.safetensors"))
        words = ["observe", str(source), "--output", parts[-1], "--calibration", spec]
        assert main([*words, "--device", "cpu"]) == 0
    merged = str(tmp_path / "merged.safetensors")
    assert main(["merge", *parts, "--output", merged]) == 0
    compacted = tmp_path / "compacted"
    words = ["compact", str(source), "--scores", merged, "--keep", KEEP]
    assert main([*words, "--output", str(compacted)]) == 0
    own, theirs = (
        run_record(directory)["calibration"]["origins"] for directory in (compacted, output)
    )
    assert own == theirs
    text = (compacted / "README.md").read_text(encoding="utf-8")
    for origin in theirs:
        assert f"| {origin['rows']} | {origin['tokens']} | `{origin['sha256']}` |" in text
    assert names_in(compacted, home) == []


def test_a_report_of_scores_names_no_directory(job, tmp_path):
    """Nor where weights of sources are given by their full names."""
    home, source, _, specs = job
    scores = str(tmp_path / "scores.safetensors")
    words = [word for spec in specs for word in ("--calibration", spec)]
    assert main(["observe", str(source), "--output", scores, *words, "--device", "cpu"]) == 0
    page = tmp_path / "page.html"
    weights = ["--source-weights", f"{specs[0]}=3", "--keep", KEEP]
    assert main(["report", scores, "--output", str(page), *weights]) == 0
    text = page.read_text(encoding="utf-8")
    assert str(home) not in text
    assert "1/rows.npy × 3" in text


@pytest.mark.parametrize("origins", ["{", "3", "[3]", '[{"source": "x"}]'])
def test_damaged_origins_are_refused(origins, job, tmp_path, capsys):
    _, source, output, _ = job
    scores = load_scores(output / "reap" / "scores.safetensors")
    scores.metadata["origins"] = origins
    save_scores(tmp_path / "scores.safetensors", scores)
    words = ["compact", source, "--scores", tmp_path / "scores.safetensors", "--keep", KEEP]
    assert main([*map(str, words), "--output", str(tmp_path / "out")]) == 2
    assert "'origins'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def older(job, tmp_path):
    """The checkpoint as another version would have written it: with paths as they were given."""
    home, source, output, specs = job
    directory = shutil.copytree(output, tmp_path / "older")
    for name in ("run.json", "eval.json"):
        path = directory / "reap" / name
        text = path.read_text().replace("1/rows.npy", specs[0]).replace("2/rows.npy", specs[1])
        path.write_text(text.replace(f'"{source.name}"', f'"{source}"'))
    path = directory / "reap" / "scores.safetensors"
    scores = load_scores(path)
    object.__setattr__(scores, "sources", tuple(specs))
    scores.metadata.pop("origins")
    save_scores(path, scores)
    assert set(names_in(directory, home)) == {"run.json", "eval.json", "scores.safetensors"}
    return directory


def test_records_of_another_version_are_refused_and_mended(older, job, capsys):
    home, _, output, _ = job
    assert main(["upload", str(older), "me/model", "--dry-run"]) == 2
    said = capsys.readouterr().err
    for name in ("reap/eval.json", "reap/run.json", "reap/scores.safetensors"):
        assert name in said
    assert f"reap-stream card {older}" in said
    assert main(["card", str(older)]) == 0
    assert names_in(older, home) == []
    for name in ("reap/run.json", "reap/eval.json", "README.md"):
        assert (older / name).read_bytes() == (output / name).read_bytes()
    assert main(["upload", str(older), "me/model", "--dry-run"]) == 0


def test_paths_are_shortened_and_nothing_else():
    labels = ["/data/a b.jsonl:9", "./c.txt", "org/d(train)"]
    shorten = Shortener(labels, ["/data", "models/big"])
    text = "'/data/a b.jsonl:9' ./c.txt org/d(train) /data https://host/data /database /data-2"
    short = "'a b.jsonl:9' c.txt org/d(train) data https://host/data /database /data-2"
    assert shorten(text) == short
    assert shorten(short) == short
    assert shorten("in models/big, not in models/bigger") == "in big, not in models/bigger"
    assert shorten.document({"/data/a b.jsonl:9": [1, None, ("./c.txt", 2.5)]}) == {
        "a b.jsonl:9": [1, None, ["c.txt", 2.5]]
    }


@pytest.mark.parametrize(
    ("labels", "short"),
    [
        (["/a/x.jsonl:5", "/b/x.jsonl:5"], ["1/x.jsonl:5", "2/x.jsonl:5"]),
        (["/a/x.jsonl:5", "/a/x.jsonl:7"], ["x.jsonl:5", "x.jsonl:7"]),
        (["x.jsonl", "/a/x.jsonl"], ["x.jsonl", "1/x.jsonl"]),
        (["sub/x.jsonl", "/a/y.jsonl"], ["sub/x.jsonl", "y.jsonl"]),
        (["~/x.jsonl", "../y.jsonl"], ["x.jsonl", "y.jsonl"]),
        (["C:\\me\\x.jsonl", "\\\\host\\y.jsonl"], ["x.jsonl", "y.jsonl"]),
        (["builtin:8", "org/d[c](train):9"], ["builtin:8", "org/d[c](train):9"]),
        (["/a/b/x.jsonl", "/a/b"], ["x.jsonl", "b"]),
    ],
)
def test_labels_stay_different(labels, short):
    shorten = Shortener(labels)
    assert [shorten(label) for label in labels] == short
    assert len(set(short)) == len(labels)
    assert not [label for label in short if is_path(label)]


def test_an_id_on_the_hub_stays():
    run = {
        "settings": {"model": "org/big@main"},
        "source": {"path": "/home/me/.cache/work", "repository": "org/big"},
        "calibration": {"sources": ["org/d(train):9"]},
    }
    assert of_run(run).document(run) == {**run, "source": {**run["source"], "path": "work"}}
    candidates = [{"label": "/a/b", "model": "/a/b"}, {"label": "big", "model": "org/big@main"}]
    given = {"text": {"sources": []}, "candidates": candidates}
    found = of_evaluation(given).document(given)["candidates"]
    assert found == [{"label": "b", "model": "b"}, candidates[1]]


def test_the_sources_own_path_is_told(job, tmp_path, capsys):
    """Files of the source stay as they are; what they say of whoever made it is no secret kept."""
    directory = shutil.copytree(job[2], tmp_path / "checkpoint")
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), "_name_or_path": "/home/them/run-7"}
    path.write_text(json.dumps(config))
    assert main(["upload", str(directory), "me/model", "--dry-run"]) == 0
    assert "config.json says _name_or_path: /home/them/run-7" in capsys.readouterr().err
