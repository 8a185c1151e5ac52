"""What a card says of the model that was cut: its name, its licence, and where it is not known."""

from __future__ import annotations

import json
import shlex
import shutil

from reap_stream.card.base import Base, base_of
from reap_stream.checkpoint.source import open_checkpoint
from reap_stream.cli import main
from tests import cards
from tests.cards import COMMIT, KEEP, card, section
from tests.hub_server import serving
from tests.model_hub_client import point_at

source, pruned = cards.source, cards.pruned
directory, render = cards.directory, cards.render


def test_the_source_can_be_named_later(render, directory):
    assert render("--base-model", f"lab/Big-FP8@{COMMIT}")[0] == 0
    assert card(directory).data.base_model == "lab/Big-FP8"
    assert render()[0] == 0
    text = card(directory).text
    assert "https://huggingface.co/lab/Big-FP8" in text
    assert f"lab/Big-FP8@{COMMIT}" in section(text, "Reproduce")
    status, err = render("--base-model", "no id")
    assert status == 2
    assert "org/name" in err


def test_a_model_from_the_hub_is_the_base(source, calibration, tmp_path, monkeypatch):
    with serving() as server:
        commit = server.add("org/from-hub", source)
        point_at(monkeypatch, server.url, tmp_path / "cache")
        words = [word for spec in calibration for word in ("--calibration", spec)]
        words += ["--keep", str(KEEP), "--output", str(tmp_path / "out")]
        assert main(["prune", "org/from-hub", *words]) == 0
    data = card(tmp_path / "out").data
    assert (data.base_model, data.license_name) == ("org/from-hub", "tiny-licence")
    assert f"prune org/from-hub@{commit} " in section(card(tmp_path / "out").text, "Reproduce")


def test_only_a_snapshot_of_the_cache_proves_an_id(source, tiny, tmp_path):
    assert base_of(open_checkpoint(source)) == Base("Tiny-8B", "org/Tiny-8B", COMMIT)
    for name in (f"models--org--x/snapshots/{COMMIT[:-1]}", f"models--org--x/other/{COMMIT}"):
        folder = tmp_path / name
        shutil.copytree(tiny("glm4_moe"), folder)
        assert base_of(open_checkpoint(folder)) == Base(folder.name)


def test_the_licence_can_be_reached(source, directory, render, tmp_path):
    """Beside the weights where its file came along, else in the source's repository."""
    facts = directory / "reap" / "card.json"
    known = json.loads(facts.read_text())
    inside = {**known, "side_files": [*known["side_files"], "LICENSE"]}
    nowhere = {**known, "base": {**known["base"], "repository": None}}
    for content, link in (
        (known, f"https://huggingface.co/org/Tiny-8B/blob/{COMMIT}/LICENSE"),
        (inside, "LICENSE"),
        (nowhere, "LICENSE"),
    ):
        facts.write_text(json.dumps(content))
        assert render()[0] == 0
        assert card(directory).data.license_link == link
    (source / "LICENSE").write_text("do as you like")
    try:
        words = ["--scores", str(directory / "reap" / "scores.safetensors"), "--keep", str(KEEP)]
        assert main(["compact", str(source), *words, "--output", str(tmp_path / "out")]) == 0
    finally:
        (source / "LICENSE").unlink()
    assert card(tmp_path / "out").data.license_link == "LICENSE"
    assert (tmp_path / "out" / "LICENSE").is_file()


def test_the_hint_of_a_checkpoint_without_facts_works(directory, source, render, tmp_path):
    before = card(directory).content
    (directory / "reap" / "card.json").unlink()
    status, err = render()
    assert status == 2
    hint = err[err.index("reap-stream compact") :].strip()
    words = shlex.split(hint)[1:]
    told = {"SOURCE": str(source), "N": str(KEEP), "NEW": str(tmp_path / "new")}
    assert main([told.get(word, word) for word in words]) == 0
    after = card(tmp_path / "new").content
    for title in ("What was changed", "Evaluation", "Serving"):
        assert section(after, title) == section(before, title)
