"""The jobs' choice of experts: a super expert that its score would drop, weights, two halves."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from reap_stream.cli import main
from reap_stream.compaction import compact
from reap_stream.errors import UsageError
from reap_stream.outputs import PrunedOutputs
from reap_stream.pipeline import observe
from reap_stream.scoring.choosing import Chooser
from reap_stream.scoring.saliency import expert_scores
from reap_stream.scoring.scores_file import load_scores, save_scores
from reap_stream.settings import ChoiceSettings, OutputSettings
from reap_stream.verifying import verify_directory
from tests.builders import add_mtp, save, tiny_model
from tests.engine import prepare, prune_to, read_kept, run_record, run_settings, stream
from tests.families import BY_ID, NUM_EXPERTS
from tests.oracle import Reference

KEEP = 4
LAYER, EXPERT = 2, 5
SUPER = ChoiceSettings(protect="super")


@pytest.fixture(scope="session")
def gifted(tmp_path_factory):
    """A model with a dense first layer and an expert of huge outputs and tiny gate weights."""
    model = tiny_model(BY_ID["glm4_moe"], num_hidden_layers=5)
    with torch.no_grad():
        # One number of every token is large and positive, so a router row can rely on it.
        model.model.embed_tokens.weight *= 30.0
        model.model.embed_tokens.weight[:, 0] = 30.0
        model.model.layers[LAYER].post_attention_layernorm.weight[0] = 1.0
        moe = model.model.layers[LAYER].mlp
        moe.gate.weight[EXPERT] = 0.0
        moe.gate.weight[:, 0] = 0.0
        moe.gate.weight[EXPERT, 0] = -4.0
        moe.gate.e_score_correction_bias[EXPERT] = 10.0
        moe.experts.down_proj[EXPERT] *= 1000.0
    return save(model, tmp_path_factory.mktemp("gifted"))


def shards(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def test_the_largest_elements_are_those_of_the_reference(gifted, calibration, rows, tmp_path):
    stats = stream(prepare(gifted, calibration), tmp_path).stats
    reference = Reference(gifted, rows, torch.float32)
    for layer, found in stats.items():
        expected = largest_elements(reference, layer)
        np.testing.assert_allclose(found.output_max.max(axis=0), expected, rtol=1e-4)
    assert max(stats, key=lambda layer: stats[layer].output_max.max()) == LAYER
    assert stats[LAYER].output_max.max(axis=0).argmax() == EXPERT


def largest_elements(reference, layer):
    """The largest |element| of each expert, one token at a time in float64."""
    from tests.oracle import experts_modules

    module = experts_modules(reference.model)[layer].double()
    largest = np.zeros(NUM_EXPERTS)
    for call in reference.calls[layer]:
        for token, chosen in enumerate(call.index.tolist()):
            for expert in chosen:
                one = torch.ones((1, 1), dtype=torch.float64)
                index = torch.tensor([[expert]])
                out = module(call.hidden[token : token + 1].double(), index, one)
                largest[expert] = max(largest[expert], out.abs().max().item())
    return largest


def test_a_super_expert_stays_though_its_score_is_low(gifted, calibration, tmp_path, capsys):
    plain = prune_to(tmp_path / "plain", gifted, calibration, KEEP)
    assert EXPERT not in read_kept(plain)[LAYER]
    assert run_record(plain)["protected"] == {}
    arguments = [gifted, "--output", tmp_path / "super", "--keep", KEEP, "--protect", "super"]
    for spec in calibration:
        arguments += ["--calibration", spec]
    arguments += ["--compute-dtype", "float32", "--device", "cpu", "--batch-tokens", 72]
    assert main(["prune", *map(str, arguments)]) == 0
    note = capsys.readouterr().err
    assert f"--protect super: 1 experts stay whatever their score in layers {LAYER}" in note
    record = run_record(tmp_path / "super")
    assert record["protected"] == {str(LAYER): [EXPERT]}
    assert record["settings"]["protect"] == "super"
    kept, before = read_kept(tmp_path / "super"), read_kept(plain)
    stats = load_scores(plain / "reap" / "scores.safetensors").layers[LAYER]
    ranked = np.argsort(-expert_scores(stats, "reap", 0, LAYER), kind="stable")
    assert kept.pop(LAYER) == sorted([EXPERT, *ranked[: KEEP - 1].tolist()])
    del before[LAYER]
    assert kept == before
    verify_directory(tmp_path / "super", gifted)
    card = (tmp_path / "super" / "README.md").read_text(encoding="utf-8")
    assert "Kept whatever their score: 1 [super experts]" in card


def test_plan_says_what_protection_costs(gifted, capsys):
    arguments = ["plan", str(gifted), "--keep", "4", "--compute-dtype", "float32"]
    assert main(arguments) == 0
    assert "second time" not in capsys.readouterr().out
    assert main([*arguments, "--protect", "super"]) == 0
    assert "reads them from the source a second time" in capsys.readouterr().out


@pytest.mark.parametrize("weights", ["keep", "bf16"])
def test_prune_with_protection_is_observe_and_compact(weights, gifted, calibration, tmp_path):
    options = {"weights": weights, "keep": "4,6"}
    pruned = prune_to(
        tmp_path / "pruned", gifted, calibration, "4,6", weights=weights, protect="super"
    )
    scores = tmp_path / "scores.safetensors"
    observe(run_settings(gifted, calibration), scores)
    output = OutputSettings(output=tmp_path / "compacted", **options)
    compact(gifted, scores, SUPER, output)
    for keep in (4, 6):
        mine, theirs = (tmp_path / name / f"keep-{keep}" for name in ("pruned", "compacted"))
        assert shards(mine) == shards(theirs)
        assert EXPERT in read_kept(mine)[LAYER]
        for name in ("config.json", "model.safetensors.index.json", "reap/kept_experts.json"):
            assert (mine / name).read_bytes() == (theirs / name).read_bytes()
        records = run_record(mine), run_record(theirs)
        for key in ("protected", "split_half", "unreached_experts"):
            assert records[0].get(key) == records[1].get(key)
        verify_directory(mine, gifted)
    assert pruned == tmp_path / "pruned"


def test_experts_that_wait_are_written_once(gifted, calibration, tmp_path, monkeypatch):
    """A job that stops between two layers' experts goes on with the second."""
    written = []
    write = PrunedOutputs._write_experts

    def stop(self, index, stats, resident):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(index)
        return write(self, index, stats, resident)

    options = {"protect": "super", "snapshot_seconds": 0.0}
    monkeypatch.setattr(PrunedOutputs, "_write_experts", stop)
    with pytest.raises(KeyboardInterrupt):
        prune_to(tmp_path / "out", gifted, calibration, KEEP, **options)
    assert written == [1, 2]
    journal = (tmp_path / ".out.reap-job" / "journal.jsonl").read_text(encoding="utf-8")
    steps = re.findall(r'"step": ?"(\w+)"', journal)
    assert steps == ["layer"] * 5 + ["experts"] * 2

    def note(self, index, stats, resident):
        written.append(index)
        return write(self, index, stats, resident)

    monkeypatch.setattr(PrunedOutputs, "_write_experts", note)
    prune_to(tmp_path / "out", gifted, calibration, KEEP, resume=True, **options)
    assert written == [1, 2, 3, 4]
    whole = prune_to(tmp_path / "whole", gifted, calibration, KEEP, **options)
    assert shards(tmp_path / "out") == shards(whole)
    assert run_record(tmp_path / "out")["protected"] == {str(LAYER): [EXPERT]}


@pytest.mark.parametrize("mtp", ["score", "match"])
def test_prediction_layers_are_written_after_the_pass_too(mtp, tiny, calibration, tmp_path):
    source = add_mtp(tiny("deepseek_v3"), tmp_path / "source", "nextn", 1)
    pruned = prune_to(tmp_path / "pruned", source, calibration, 6, mtp=mtp, protect="super")
    scores = pruned / "reap" / "scores.safetensors"
    output = OutputSettings(output=tmp_path / "compacted", keep="6", mtp=mtp)
    compact(source, scores, SUPER, output)
    assert shards(tmp_path / "compacted") == shards(pruned)
    protected = run_record(pruned)["protected"]
    assert protected
    # Two groups of four experts each keep three.
    kept = read_kept(pruned)
    assert max(kept) == 3
    assert all(sum(expert < 4 for expert in experts) == 3 for experts in kept.values())
    assert all({*experts} <= {*kept[int(layer)]} for layer, experts in protected.items())
    assert "3" not in protected
    verify_directory(pruned, source)


def test_protection_cannot_go_with_pruned_activations(gifted, calibration, tmp_path):
    with pytest.raises(UsageError, match=r"--protect super is known once all layers are scored"):
        prune_to(tmp_path / "out", gifted, calibration, KEEP, protect="super", propagate="pruned")


def test_scores_of_an_earlier_version_do_not_protect(gifted, calibration, tmp_path):
    path = tmp_path / "scores.safetensors"
    observe(run_settings(gifted, calibration), path)
    scores = load_scores(path)
    for stats in scores.layers.values():
        stats.output_max = stats.odd = None
    save_scores(path, scores)
    output = OutputSettings(output=tmp_path / "out", keep=str(KEEP))
    with pytest.raises(UsageError, match="layer 1 have no output_max"):
        compact(gifted, path, SUPER, output)
    compact(gifted, path, ChoiceSettings(), output)
    record = run_record(tmp_path / "out")
    assert record["split_half"] == {}
    assert "did not take halves" in record["split_half_missing"]


def test_weighted_sources_are_read_again_or_not_at_all(tiny, halved, tmp_path):
    source = tiny("glm4_moe")
    first, second = halved
    weights = ((first, 2.0), (second, 0.0))
    pruned = prune_to(tmp_path / "pruned", source, halved, KEEP, source_weights=weights)
    names = [Path(spec).name for spec in halved]
    recorded = run_record(pruned)["settings"]["source_weights"]
    assert recorded == dict(zip(names, (2.0, 0.0), strict=True))
    card = (pruned / "README.md").read_text(encoding="utf-8")
    assert f"Weights of calibration sources (others 1): `{names[0]}` 2, `{names[1]}` 0." in card
    alone = prune_to(tmp_path / "alone", source, [first], KEEP)
    assert shards(pruned) == shards(alone)
    unweighted = prune_to(tmp_path / "unweighted", source, halved, KEEP)
    assert read_kept(unweighted) != read_kept(alone)
    out = tmp_path / "compacted"
    arguments = ["--scores", unweighted / "reap" / "scores.safetensors", "--output", out]
    arguments += ["--keep", KEEP, "--source-weights", f"{names[1]}=0,{names[0]}=2"]
    assert main(["compact", str(source), *map(str, arguments)]) == 0
    assert shards(out) == shards(alone)
    verify_directory(out, source)


def test_unknown_sources_are_named(tiny, calibration, tmp_path, capsys):
    arguments = ["prune", tiny("glm4_moe"), "--output", tmp_path / "out", "--keep", KEEP]
    arguments += ["--calibration", calibration[0], "--source-weights", "prose.jsonl=2"]
    assert main([*map(str, arguments)]) == 2
    assert f"no calibration source 'prose.jsonl': there are '{calibration[0]}'" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="no calibration source"):
        prune_to(
            tmp_path / "out",
            tiny("glm4_moe"),
            calibration,
            KEEP,
            source_weights=(("prose.jsonl", 2.0),),
        )


def test_scores_survive_a_target_that_protection_makes_impossible(
    gifted, calibration, tmp_path, monkeypatch
):
    def refuse(*_arguments):
        raise UsageError("too many are protected")

    with monkeypatch.context() as patched:
        patched.setattr(Chooser, "check", refuse)
        with pytest.raises(UsageError, match="too many are protected") as caught:
            prune_to(tmp_path / "out", gifted, calibration, KEEP, protect="super")
    (scores,) = (tmp_path / ".out.reap-job").glob("scores.safetensors")
    assert str(scores) in str(caught.value)
    arguments = [gifted, "--scores", scores, "--output", tmp_path / "again", "--keep", KEEP]
    assert main(["compact", *map(str, arguments)]) == 0
