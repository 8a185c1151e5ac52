"""The report, read back: its figures are those of the scores, and it loads nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reap_stream.cli import build_parser, main
from reap_stream.reporting.command import read_subject
from reap_stream.reporting.figures import figures_of
from reap_stream.reporting.subject import read_checkpoint
from reap_stream.scoring.agreement import split_half
from reap_stream.scoring.choosing import choose_experts, open_chooser
from reap_stream.scoring.saliency import expert_scores, unreached
from reap_stream.scoring.scores_file import save_scores
from reap_stream.settings import ChoiceSettings
from tests.engine import prune_to
from tests.html_pages import Page
from tests.reports import SOURCES, make_scores, write_evaluation, write_pruned

image = pytest.importorskip("matplotlib.image")

LAYERS, EXPERTS, KEEP = range(2, 7), 24, 12


def write(subject, output, *options):
    arguments = ["report", str(subject), "--output", str(output), *map(str, options)]
    assert main(arguments) == 0
    return Page(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def scores():
    return make_scores(LAYERS, EXPERTS)


@pytest.fixture(scope="module")
def kept(scores):
    return choose_experts(
        scores.layers, scores.sources, KEEP, ChoiceSettings(), groups=1, num_layers=7
    )


@pytest.fixture(scope="module")
def pruned(scores, kept, tmp_path_factory):
    return write_pruned(tmp_path_factory.mktemp("pruned") / "out", scores, kept)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    found = [("Big", "", 24, 2.0), ("a", "", 18, 2.125), ("b", "reap", 12, 2.5)]
    return write_evaluation(tmp_path_factory.mktemp("eval") / "eval.json", found)


@pytest.fixture(scope="module")
def page(pruned, evaluation, tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "report.html"
    return write(pruned, output, "--eval", evaluation), output


def share(part, whole):
    return f"{100 * part / whole:.1f} %"


def test_layer_table_is_the_scores(page, scores, kept):
    table = page[0].tables["layer-table"]
    assert table[0][:5] == ["layer", "routed tokens", "unreached", "mean score", "highest"]
    for row, layer in zip(table[1:], LAYERS, strict=True):
        stats = scores.layers[layer]
        tokens, mass = stats.tokens.sum(axis=0), stats.gate_norm_sum.sum(axis=0)
        values = [m / t if t else 0.0 for m, t in zip(mass, tokens, strict=True)]
        gone = sorted(set(range(EXPERTS)) - set(kept[layer]))
        assert row[:5] == [
            str(layer),
            f"{tokens.sum():,}",
            str(len(unreached(stats))),
            f"{sum(values) / EXPERTS:.4g}",
            f"{max(values):.4g}",
        ]
        assert row[5] == f"{min(values[expert] for expert in kept[layer]):.4g}"
        assert row[6] == f"{max(values[expert] for expert in gone):.4g}"
        assert row[7] == share(sum(tokens[expert] for expert in gone), tokens.sum())
        assert row[8] == share(sum(mass[expert] for expert in gone), mass.sum())


def test_source_table_is_the_scores(page, scores, kept):
    table = page[0].tables["source-table"]
    for number, row in enumerate(table[1:]):
        gone = {i: sorted(set(range(EXPERTS)) - set(kept[i])) for i in LAYERS}
        tokens = {i: scores.layers[i].tokens[number] for i in LAYERS}
        mass = {i: scores.layers[i].gate_norm_sum[number] for i in LAYERS}
        assert row[0] == SOURCES[number]
        assert row[1] == f"{sum(array.sum() for array in tokens.values()):,}"
        own, own_gone = 0, 0
        for layer in LAYERS:
            counts = scores.layers[layer].tokens
            for expert in range(EXPERTS):
                shares = [counts[s, expert] / counts[s].sum() for s in range(len(SOURCES))]
                if sum(shares) and shares[number] / sum(shares) >= 2 / 3:
                    own += 1
                    own_gone += expert in gone[layer]
        assert row[2:4] == [str(own), str(own_gone)]
        for cell, arrays in zip(row[4:6], (tokens, mass), strict=True):
            lost = sum(arrays[i][gone[i]].sum() for i in LAYERS)
            assert cell == share(lost, sum(array.sum() for array in arrays.values()))
        alone = choose_experts(
            scores.layers,
            SOURCES,
            KEEP,
            ChoiceSettings(source_weights=tuple((s, float(s == row[0])) for s in SOURCES)),
            groups=1,
            num_layers=7,
        )
        same = sum(len(set(alone[i]) & set(kept[i])) for i in LAYERS)
        assert row[6] == share(same, KEEP * len(LAYERS))


def test_heat_map_has_a_pixel_for_each_expert(page, scores, kept):
    wide, narrow = (maps[0] for maps in np.split(np.array(page[0].images["scores"][::2]), 2))
    assert wide.shape == (len(LAYERS), EXPERTS, 3)
    np.testing.assert_array_equal(wide, narrow)
    brightness = wide @ [0.2126, 0.7152, 0.0722]
    for row, layer in enumerate(LAYERS):
        stats = scores.layers[layer]
        lost = set(unreached(stats))
        order = np.argsort(expert_scores(stats, "reap", 0, layer), kind="stable")
        for expert in range(EXPERTS):
            red, green, blue = wide[row, expert]
            if expert in lost:
                assert (red, green, blue) == (207, 34, 46)
            else:
                assert (red == green == blue) != (expert in kept[layer])
        # Colour and grey alike are the brighter, the higher the score.
        seen = [brightness[row, expert] for expert in order if expert not in lost]
        assert np.all(np.diff(seen) >= -1.5)


def test_unreached_experts_are_listed(page, scores):
    listed = {}
    for layer, count, ranges in page[0].tables["unreached-table"][1:]:
        ends = [tuple(map(int, part.split("–"))) for part in ranges.split(", ")]
        listed[int(layer)] = [n for run in ends for n in range(run[0], run[-1] + 1)]
        assert int(count) == len(listed[int(layer)])
    expected = {i: unreached(stats) for i, stats in scores.layers.items()}
    assert listed == {i: experts for i, experts in expected.items() if experts}
    assert listed


def test_agreement_is_that_of_the_run(page, scores):
    chooser = open_chooser(scores.layers, SOURCES, ChoiceSettings(), groups=1, num_layers=7)
    agreed = split_half(chooser, scores.layers, KEEP)
    column = [row[-1] for row in page[0].tables["layer-table"]]
    assert column[0] == "halves agree"
    assert column[1:][agreed.layer - LAYERS[0]] == share(agreed.lowest, 1)
    assert share(agreed.mean, 1) in page[0].text["agreement"]
    assert f"{share(agreed.chance, 1)} would be by chance" in page[0].text["agreement"]


def test_evaluation_and_facts(page):
    assert page[0].tables["evaluation-table"][1:] == [
        ["Big", "24", "0.0 %", "2.0000", "+0.0000", "0.0000", "100.0 %"],
        ["a", "18", "25.0 %", "2.1250", "+0.1250", "0.1000", "95.0 %"],
        ["b", "12", "50.0 %", "2.5000", "+0.5000", "0.2000", "90.0 %"],
    ]
    facts = dict(page[0].tables["facts-table"])
    assert facts["model"] == "org/Big-MoE"
    assert facts["time"] == "1 h 2 min"
    assert facts["peak memory"] == "9.10 GiB"
    assert facts["read"] == "354.00 GB"
    assert facts["calibration tokens"] == "123,456"
    assert "a note of the run" in page[0].text["notes"]


def test_nothing_is_loaded(page):
    found, output = page
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(found.tags)
    for tag, key, value in found.attributes:
        if key in ("src", "href", "action", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, value[:80])
        assert "url(" not in value or "url(#" in value
    text = output.read_text(encoding="utf-8")
    assert "//" not in "".join(part for part in text.split('"') if "base64" not in part)
    assert "@import" not in text


def test_ids_are_of_one_element_and_references_lead_to_them(page):
    ids = [value for _, key, value in page[0].attributes if key == "id"]
    assert len(ids) == len(set(ids))
    for _, key, value in page[0].attributes:
        if key == "href" and value.startswith("#"):
            assert value[1:] in ids
        if value.startswith("url(#"):
            assert value[5:-1] in ids


def test_pictures_take_the_colours_of_the_theme(page):
    text = page[1].read_text(encoding="utf-8")
    drawings = text[text.index("<body>") :]
    assert "var(--ink)" in drawings
    assert "#1b1f24" not in drawings
    assert "#59636e" not in drawings


def test_pictures_lie_beside_it(page):
    names = {path.name for path in page[1].parent.iterdir()}
    parts = ("scores", "curves", "removed", "agreement", "tokens", "sources", "loss", "errors")
    assert names == {"report.html", *(f"report-{part}.png" for part in parts)}
    for name in names - {"report.html"}:
        pixels = image.imread(page[1].parent / name)
        assert len(np.unique(pixels[::9, ::9].reshape(-1, pixels.shape[-1]), axis=0)) > 5


@pytest.mark.parametrize(
    ("options", "method", "keep"),
    [
        (["--keep", "6"], "reap", 6),
        (["--sparsity", "0.25", "--method", "ean"], "ean", 18),
        (["--keep", "6", "--source-weights", "tools.jsonl=3,code.jsonl=0"], "reap", 6),
    ],
)
def test_a_file_of_scores_with_a_cut(options, method, keep, scores, tmp_path):
    path = tmp_path / "scores.safetensors"
    save_scores(path, scores)
    arguments = ["report", str(path), "--output", str(tmp_path / "page.html"), *options]
    subject = read_subject(build_parser().parse_args(arguments))
    weights = (("tools.jsonl", 3.0), (SOURCES[0], 0.0)) if "--source-weights" in options else ()
    choice = ChoiceSettings(method, source_weights=weights)
    kept = choose_experts(scores.layers, SOURCES, keep, choice, groups=1, num_layers=7)
    found = figures_of(subject)
    for row, layer in enumerate(LAYERS):
        np.testing.assert_array_equal(np.flatnonzero(found.kept[row]), kept[layer])
    assert "router without groups" in subject.notes[0]


def test_a_file_of_scores_alone(scores, tmp_path):
    save_scores(tmp_path / "scores.safetensors", scores)
    found = write(tmp_path / "scores.safetensors", tmp_path / "page.html")
    assert "No target" in found.text[""]
    assert "no target was given" in found.text["agreement"]
    assert "removed" not in found.text
    assert len(found.tables["layer-table"][0]) == 5


def test_the_routers_groups_are_found(scores, tmp_path):
    choice = ChoiceSettings()
    kept = choose_experts(scores.layers, SOURCES, KEEP, choice, groups=4, num_layers=7)
    subject = read_checkpoint(write_pruned(tmp_path / "grouped", scores, kept))
    assert subject.chooser.groups == 4
    assert subject.notes == ()
    chooser = open_chooser(scores.layers, SOURCES, choice, groups=4, num_layers=7)
    agreed = figures_of(subject).agreed
    assert agreed is not None
    assert agreed.shares.mean() == pytest.approx(split_half(chooser, scores.layers, KEEP).mean)


def test_a_choice_that_the_scores_do_not_lead_to_is_said(scores, tmp_path):
    kept = {layer: range(KEEP) for layer in LAYERS}
    found = write(write_pruned(tmp_path / "other", scores, kept), tmp_path / "page.html")
    assert "not the ones that these scores lead to" in found.text["notes"]


def test_what_a_job_wrote(tiny, calibration, tmp_path):
    pruned = prune_to(tmp_path / "out", tiny("glm4_moe"), calibration)
    found = write(pruned, tmp_path / "page.html")
    run = json.loads((pruned / "reap" / "run.json").read_text(encoding="utf-8"))
    facts = dict(found.tables["facts-table"])
    assert facts["calibration tokens"] == f"{run['calibration']['tokens']:,}"
    assert "notes" not in found.text or "lead to" not in found.text["notes"]
    if run["split_half"]:
        assert share(run["split_half"]["4"]["mean"], 1) in found.text["agreement"]


def test_the_evaluation_in_a_checkpoint_is_found(scores, kept, tmp_path):
    pruned = write_pruned(tmp_path / "out", scores, kept)
    write_evaluation(pruned / "reap" / "eval.json", [("Big", "", 24, 2.0)])
    found = write(pruned, tmp_path / "page.html")
    assert found.tables["evaluation-table"][1][0] == "Big"
    assert not (tmp_path / "page-loss.png").exists()
