"""What must never happen: layers published unwritten, a source overwritten, an old output lost."""

from __future__ import annotations

import pytest

from reap_stream.errors import OutputError, UsageError
from reap_stream.layer_pass import LayerPass
from reap_stream.outputs import PrunedOutputs
from reap_stream.pipeline import observe
from tests.engine import prune_to, run_settings


def shards(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def stop_before(monkeypatch, stop):
    """Makes a pass end as if interrupted before layer `stop`."""
    run_layer = LayerPass._run_layer

    def run_or_stop(self, index):
        if index == stop:
            raise KeyboardInterrupt
        run_layer(self, index)

    monkeypatch.setattr(LayerPass, "_run_layer", run_or_stop)


@pytest.mark.parametrize("lines", [0, 1, 2])
def test_a_snapshot_ahead_of_the_journal_is_not_trusted(
    tiny, calibration, tmp_path, monkeypatch, lines
):
    source = tiny("qwen3_moe")
    whole = prune_to(tmp_path / "whole", source, calibration)
    output = tmp_path / "pruned"
    with monkeypatch.context() as patch:
        stop_before(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            prune_to(output, source, calibration, snapshot_seconds=0.0)
    job = tmp_path / ".pruned.reap-job"
    assert [path.name for path in (job / "hidden").iterdir()] == ["layer-2.safetensors"]
    journal = job / "journal.jsonl"
    kept = journal.read_bytes().splitlines(keepends=True)[:lines]
    journal.write_bytes(b"".join(kept))
    prune_to(output, source, calibration, resume=True)
    assert shards(output) == shards(whole)


def test_nothing_is_published_while_a_layer_is_not_written(
    tiny, calibration, tmp_path, monkeypatch
):
    monkeypatch.setattr(PrunedOutputs, "finish_rest", lambda _: None)
    output = tmp_path / "pruned"
    with pytest.raises(OutputError, match="nothing is published"):
        prune_to(output, tiny("qwen3_moe"), calibration)
    assert not output.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "scores.safetensors"])
def test_observe_writes_nothing_into_its_source(tiny, calibration, name):
    source = tiny("qwen3_moe")
    before = shards(source)
    with pytest.raises(UsageError, match="lies inside the source"):
        observe(run_settings(source, calibration), source / name, overwrite=True)
    assert shards(source) == before


def test_observe_overwrites_scores_alone(tiny, calibration, tmp_path):
    precious = tmp_path / "weights.safetensors"
    precious.write_bytes((tiny("mixtral") / "model.safetensors").read_bytes())
    before = precious.read_bytes()
    with pytest.raises(UsageError, match="holds no scores"):
        observe(run_settings(tiny("qwen3_moe"), calibration), precious, overwrite=True)
    assert precious.read_bytes() == before


def test_a_resumed_overwrite_still_overwrites(tiny, calibration, tmp_path, monkeypatch):
    source, output = tiny("qwen3_moe"), tmp_path / "pruned"
    old = shards(prune_to(output, source, calibration, keep=6))
    with monkeypatch.context() as patch:
        stop_before(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            prune_to(output, source, calibration, overwrite=True)
    assert shards(output) == old
    prune_to(output, source, calibration, resume=True)
    assert shards(output) == shards(prune_to(tmp_path / "whole", source, calibration))


def test_an_existing_output_is_refused_before_anything_is_read(tiny, tmp_path):
    output = tmp_path / "pruned"
    output.mkdir()
    (output / "precious").touch()
    with pytest.raises(UsageError, match="exists already"):
        prune_to(output, tiny("qwen3_moe"), ["no such file.npy"])
