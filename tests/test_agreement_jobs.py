"""What a job says of two halves of its calibration rows."""

from __future__ import annotations

import numpy as np
import pytest

from reap_stream.cli import main
from reap_stream.pipeline import observe
from reap_stream.scoring.halves import half_of_row
from reap_stream.scoring.saliency import LayerStats, Scores, expert_scores
from reap_stream.scoring.scores_file import load_scores, save_scores
from reap_stream.scoring.selection import select
from tests.builders import write_rows
from tests.engine import prepare, prune_to, run_record, run_settings, stream
from tests.families import NUM_EXPERTS

KEEP = 4


def test_the_halves_are_those_of_two_runs(tiny, halved, tmp_path):
    source = tiny("glm4_moe")
    pruned = prune_to(tmp_path / "pruned", source, halved, "4,6")
    found = load_scores(pruned / "keep-4" / "reap" / "scores.safetensors")
    kept = []
    for half in range(2):
        arrays = [np.load(spec) for spec in halved]
        picked = [a[[half_of_row(n) == half for n in range(len(a))]] for a in arrays]
        specs = write_rows(tmp_path / f"half-{half}", picked)
        alone = stream(prepare(source, specs), tmp_path).stats
        for layer, stats in alone.items():
            mine = found.layers[layer].halves()[half]
            np.testing.assert_array_equal(mine.tokens, stats.tokens)
            np.testing.assert_allclose(mine.gate_norm_sum, stats.gate_norm_sum, rtol=1e-5)
        kept.append(
            {
                (keep, layer): set(select(expert_scores(stats, "reap", 0, layer), keep, 1))
                for layer, stats in alone.items()
                for keep in (4, 6)
            }
        )
    for keep in (4, 6):
        shares = {
            layer: len(kept[0][keep, layer] & kept[1][keep, layer]) / keep for layer in found.layers
        }
        record = run_record(pruned / f"keep-{keep}")["split_half"][str(keep)]
        assert record["mean"] == pytest.approx(sum(shares.values()) / len(shares), abs=1e-6)
        assert record["lowest"] == pytest.approx(min(shares.values()), abs=1e-6)
        assert shares[record["layer"]] == min(shares.values())
        assert record["chance"] == keep / NUM_EXPERTS


def flat_scores(path, source, calibration, odd):
    """Scores of a model in which one half of the rows likes the first experts, one some others."""
    observe(run_settings(source, calibration), path)
    scores = load_scores(path)
    layers = {}
    for layer in scores.layers:
        stats = layers[layer] = LayerStats.zeros(1, NUM_EXPERTS)
        stats.tokens[:], stats.odd.tokens[:] = 2, 1
        stats.odd.gate_norm_sum[:] = odd
        stats.gate_norm_sum[:] = stats.odd.gate_norm_sum + np.arange(NUM_EXPERTS)[::-1]
    save_scores(path, Scores(layers, ("a",), NUM_EXPERTS, scores.model_fingerprint))


@pytest.mark.parametrize(
    ("odd", "mean", "low"),
    [
        (range(NUM_EXPERTS, 0, -1), 1.0, False),
        ([8, 7, 6, 1, 5, 2, 3, 4], 0.75, False),
        ([8, 7, 1, 2, 6, 5, 3, 4], 0.5, True),
        (range(NUM_EXPERTS), 0.0, True),
    ],
)
def test_a_low_agreement_is_a_warning(odd, mean, low, tiny, calibration, tmp_path, capsys):
    source, path = tiny("glm4_moe"), tmp_path / "scores.safetensors"
    flat_scores(path, source, calibration, list(odd))
    arguments = ["--scores", path, "--output", tmp_path / "out", "--keep", KEEP]
    assert main(["compact", str(source), *map(str, arguments)]) == 0
    assert run_record(tmp_path / "out")["split_half"] == {
        "4": {"mean": mean, "lowest": mean, "layer": 1, "chance": 0.5}
    }
    notes = capsys.readouterr().err
    assert f"keep 4: the two halves of the calibration rows keep {mean:.1%}" in notes
    assert ("calibrate on more rows" in notes) == low


def test_where_all_experts_stay_there_is_nothing_to_agree_on(tiny, calibration, tmp_path, capsys):
    source, path = tiny("glm4_moe"), tmp_path / "scores.safetensors"
    flat_scores(path, source, calibration, list(range(NUM_EXPERTS)))
    arguments = ["--scores", path, "--output", tmp_path / "out", "--keep", f"{KEEP},{NUM_EXPERTS}"]
    assert main(["compact", str(source), *map(str, arguments)]) == 0
    notes = capsys.readouterr().err
    assert f"keep {KEEP}: the two halves" in notes
    assert f"keep {NUM_EXPERTS}: the two halves" not in notes


def test_a_source_of_one_row_has_no_halves(tiny, calibration, tmp_path):
    pruned = prune_to(tmp_path / "pruned", tiny("glm4_moe"), calibration, KEEP)
    record = run_record(pruned)
    assert record["split_half"] == {}
    assert record["split_half_missing"].endswith("rows-2.npy' has a single row")
    weights = tuple((spec, float(place < 2)) for place, spec in enumerate(calibration))
    other = prune_to(
        tmp_path / "other", tiny("glm4_moe"), calibration, KEEP, source_weights=weights
    )
    assert list(run_record(other)["split_half"]) == [str(KEEP)]
