"""README.md of a pruned checkpoint, read back with huggingface_hub and held against the facts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from transformers import AutoConfig

from reap_stream.card.inputs import read_inputs
from reap_stream.card.reproduce import command, command_text
from reap_stream.cli import main
from tests import cards
from tests.builders import add_mtp, load_tensors
from tests.cards import COMMIT, KEEP, card, rows, section
from tests.engine import prune_to
from tests.families import NUM_EXPERTS

source, pruned = cards.source, cards.pruned
directory, render = cards.directory, cards.render


def run(*words):
    assert main(list(map(str, words))) == 0


def test_the_front_matter_says_what_was_cut(pruned):
    data = card(pruned).data.to_dict()
    assert data == {
        "base_model": "org/Tiny-8B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "pruning", "expert-pruning", "reap", "glm4_moe", "reap-stream"],
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": f"https://huggingface.co/org/Tiny-8B/blob/{COMMIT}/LICENSE",
        "language": ["en", "zh"],
    }


def test_the_figures_are_those_of_config_and_weights(pruned, source):
    found = rows(card(pruned).text)
    config = AutoConfig.from_pretrained(pruned)
    assert found["experts a layer"] == [str(NUM_EXPERTS), str(config.n_routed_experts)]
    assert found["experts a token"] == [str(config.num_experts_per_tok)] * 2
    assert found["context (tokens)"] == [str(config.max_position_embeddings)] * 2
    sizes = [sum(t.nbytes for t in load_tensors(d).values()) / 1e6 for d in (source, pruned)]
    assert found["bytes of tensors"] == [f"{size:.2f} MB" for size in sizes]
    assert found["stored as (share of bytes)"] == ["F32", "F32"]
    facts = json.loads((pruned / "reap" / "card.json").read_text())
    assert sum(facts["tensors"].values()) == len(load_tensors(pruned))
    per_expert = facts["source"]["parameters"] - facts["pruned"]["parameters"]
    # Experts that no token uses do not count as active; router rows do.
    assert facts["source"]["active_parameters"] - facts["pruned"]["active_parameters"] > 0
    assert facts["pruned"]["active_parameters"] < facts["pruned"]["parameters"]
    assert per_expert > 0


def test_the_sources_card_stands_below_without_its_front_matter(pruned):
    text = card(pruned).text
    own, theirs = text.split("## The card of org/Tiny-8B\n")
    assert theirs.strip() == "# Tiny\n\nOf *its* own."
    assert "gated" not in text
    assert "tiny-licence" in own


def test_without_an_evaluation_it_says_so(pruned):
    assert section(card(pruned).text, "Evaluation").strip() == "Quality: not evaluated."


def test_no_path_of_the_machine_stands_in_it(pruned, source, calibration):
    text = (pruned / "README.md").read_text(encoding="utf-8")
    for path in (source, pruned, *calibration):
        assert str(path) not in text
    assert "/tmp" not in text
    assert "`rows-0.npy`" in text


@pytest.mark.parametrize("options", [{}, {"weights": "bf16"}, {"method": "random", "seed": 5}])
def test_rendered_again_it_is_the_same(options, source, calibration, tmp_path):
    output = prune_to(tmp_path / "out", source, calibration, KEEP, **options)
    before = (output / "README.md").read_bytes()
    (output / "README.md").unlink()
    assert main(["card", str(output)]) == 0
    assert (output / "README.md").read_bytes() == before
    assert ("reap" in card(output).data.tags) is (options.get("method") != "random")


def test_the_command_makes_the_same_bytes(source, calibration, tmp_path, monkeypatch):
    # Where the files that it names lie.
    monkeypatch.chdir(Path(calibration[0]).parent)
    options = {"method": "ean", "seed": 3, "source_weights": ((calibration[0], 2.5),)}
    output = prune_to(
        tmp_path / "out", source, calibration, "4,6", max_shard_nbytes=60_000, **options
    )
    again = tmp_path / "again"
    words = command(read_inputs(output / "keep-6"))
    assert words[2] == f"org/Tiny-8B@{COMMIT}"
    words[2], words[words.index("--output") + 1] = str(source), str(again)
    assert main(words[1:]) == 0
    assert contents(again) == contents(output / "keep-6")
    compacted = tmp_path / "compacted"
    scores = output / "keep-6" / "reap" / "scores.safetensors"
    arguments = ["--output", compacted, "--keep", 4, "--protect", "super"]
    assert main(list(map(str, ["compact", source, "--scores", scores, *arguments]))) == 0
    words = command(read_inputs(compacted))
    words[2], words[words.index("--output") + 1] = str(source), str(again)
    words[words.index("--scores") + 1] = str(compacted / words[words.index("--scores") + 1])
    assert main([*words[1:], "--overwrite"]) == 0
    assert contents(again) == contents(compacted)


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.glob("*.*") if p.name != "README.md"}


def test_the_command_can_be_given_to_a_shell(pruned):
    inputs = read_inputs(pruned)
    text = command_text(inputs)
    assert shlex.split(text.replace("\\\n", " ")) == command(inputs)
    # In the card itself without directories.
    shown = section(card(pruned).text, "Reproduce").split("```sh\n")[1].split("\n```")[0]
    words = shlex.split(shown.replace("\\\n", " "))
    assert words[words.index("--calibration") + 1] == "rows-0.npy"


def test_an_evaluation_stands_in_it_with_its_n(render, directory, source, calibration, tmp_path):
    found = tmp_path / "found.json"
    text = ["--text", calibration[0], "--text", calibration[1], "--output", found]
    options = ["--device", "cpu", "--compute-dtype", "float32"]
    assert main(list(map(str, ["eval", source, directory, *text, *options]))) == 0
    assert render("--eval", found)[0] == 0
    evaluation = section(card(directory).text, "Evaluation")
    document = json.loads(found.read_text())
    for candidate in document["candidates"]:
        figures = candidate["all"]
        assert f"| {figures['tokens']} | {figures['loss']:.4f} |" in evaluation
    assert evaluation.count("same top-1 |") == 3
    assert "Quality: not evaluated" not in evaluation
    assert str(tmp_path) not in (directory / "README.md").read_text()
    # It stays without being given again.
    before = (directory / "README.md").read_bytes()
    assert render()[0] == 0
    assert (directory / "README.md").read_bytes() == before


def test_an_evaluation_of_another_pruning_of_as_many_experts_is_refused(
    render, directory, source, calibration, tmp_path, capsys
):
    found, text = (
        tmp_path / "found.json",
        ["--text", calibration[0], "--output", tmp_path / "found.json"],
    )
    scores = ["--scores", directory / "reap" / "scores.safetensors", "--keep", str(KEEP)]
    own = json.loads((directory / "reap" / "run.json").read_text())["settings"]["method"]
    others = ["--method", f"{own},random"]
    assert main(list(map(str, ["eval", source, *scores, *others, *text]))) == 0
    assert render("--eval", found)[0] == 0
    # Of two candidates of as many experts it tells which one was written.
    assert f"This model is `{own} keep {KEEP}`." in (directory / "README.md").read_text()
    document = json.loads(found.read_text())
    kept = [candidate.get("kept_sha256") for candidate in document["candidates"]]
    assert kept[0] is None
    assert kept[1] != kept[2]
    assert ["fingerprint" in candidate for candidate in document["candidates"]] == [
        True,
        False,
        False,
    ]
    del document["candidates"][1]
    found.write_text(json.dumps(document))
    assert render("--eval", found)[0] == 2
    # Written by hand, or by a version that knew no better.
    del document["candidates"][1]["kept_sha256"]
    found.write_text(json.dumps(document))
    assert render("--eval", found)[0] == 0


def test_an_evaluation_of_the_same_experts_in_other_bytes_is_refused(
    directory, source, calibration, tmp_path, capsys
):
    """Whose figures are those of another format; or against another model than the one that was cut."""
    other, found = tmp_path / "other", tmp_path / "found.json"
    scores = ["--scores", directory / "reap" / "scores.safetensors", "--keep", KEEP]
    run("compact", source, *scores, "--weights", "fp8-channel", "--output", other)
    run("eval", source, other, "--text", calibration[0], "--output", found)
    document = json.loads(found.read_text())
    capsys.readouterr()
    assert main(["card", str(directory), "--eval", str(found)]) == 2
    assert "other weights with the same experts" in capsys.readouterr().err
    run("card", other, "--eval", found)
    document["candidates"][0]["fingerprint"] = "0" * 64
    document["candidates"][1].pop("fingerprint")
    found.write_text(json.dumps(document))
    assert main(["card", str(directory), "--eval", str(found)]) == 2
    assert "not the one that was cut" in capsys.readouterr().err
    assert not (directory / "reap" / "eval.json").exists()


def test_an_evaluation_of_other_models_is_refused(render, directory, tmp_path):
    found = tmp_path / "found.json"
    before = (directory / "README.md").read_bytes()
    for content in (
        {"format_version": 1, "text": {}, "candidates": [{"keep": 8}, {"keep": 5}]},
        {"format_version": 1, "text": {}, "candidates": [{"keep": 4}, {"keep": 8}]},
        {"format_version": 2, "text": {}, "candidates": [{"keep": 8}, {"keep": 4}]},
        {"format_version": 1, "text": {}, "candidates": [{"keep": 8}, {"keep": 4}]},
        {"format_version": 1, "text": {}, "candidates": []},
        {},
    ):
        found.write_text(json.dumps(content))
        assert render("--eval", found)[0] == 2
    assert (directory / "README.md").read_bytes() == before
    assert not (directory / "reap" / "eval.json").exists()


@pytest.mark.parametrize("name", ["card.json", "run.json"])
@pytest.mark.parametrize("content", [None, "{", "[]", '{"settings": 3}'])
def test_damaged_records_are_refused(name, content, render, directory):
    path = directory / "reap" / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    status, err = render()
    assert status == 2
    assert "json" in err


@pytest.mark.parametrize(
    ("mtp", "row", "said"),
    [
        ("score", ["1, 8 experts", "1, 4 experts"], "pruned by their own routing"),
        ("keep", ["1, 8 experts", "1, 8 experts"], "where config.json counts 4 for all layers"),
        ("drop", ["1, 8 experts", "none with experts"], "were left out"),
    ],
)
def test_prediction_layers(mtp, row, said, tiny, calibration, tmp_path):
    source = add_mtp(tiny("glm4_moe"), tmp_path / "source", "nextn")
    output = prune_to(tmp_path / "out", source, calibration, KEEP, mtp=mtp)
    text = card(output).text
    assert rows(text)["next-token-prediction (MTP) layers"] == row
    assert said in text
    assert ("--speculative-config" in text) is (mtp == "score")
    # A directory proves no id.
    assert "base_model" not in card(output).data.to_dict()


def test_weights_in_another_format(pruned_to):
    _, output = pruned_to("glm4_moe", "fp8")
    facts = json.loads((output / "reap" / "card.json").read_text())
    assert facts["quantization"] == "FP8"
    assert facts["tensors"]["computed"] > 0
    data, text = card(output).data, card(output).text
    assert "fp8" in data.tags
    assert f"{facts['tensors']['computed']} tensors were computed" in text
    assert "-FP8\n" in text
    assert rows(text)["stored as (share of bytes)"][1].startswith("F8_E4M3 ")
