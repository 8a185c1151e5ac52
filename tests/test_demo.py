from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from reap_stream.cli import main
from reap_stream.demo import introduction, run_demo
from reap_stream.demo_checkpoint import DemoModel, write_checkpoint
from reap_stream.verifying import verify_directory

TINY = DemoModel(
    hidden=64, layers=3, experts=10, quiet=4, width=32, top_k=2, heads=4, vocabulary=512, shards=2
)


def tensors_of(directory):
    """Name → (dtype, shape), as the safetensors library reads them."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "out"
    return directory, run_demo(directory, TINY)


def test_what_was_removed_are_the_quiet_experts(finished):
    _, result = finished
    assert result.removed == result.quiet_removed == 4 * 2
    assert (result.source.experts, result.pruned.experts) == (10, 6)


def test_parameters_are_those_of_the_decoder_without_scales(finished):
    directory, result = finished
    for name, side in (("source", result.source), ("pruned", result.pruned)):
        counted = sum(
            math.prod(shape)
            for key, (_, shape) in tensors_of(directory / name).items()
            if not key.startswith("model.layers.3.")
            and not key.endswith(("_scale", "e_score_correction_bias"))
        )
        assert side.parameters == counted
        assert side.nbytes == sum(p.stat().st_size for p in directory.rglob(f"{name}/**/*.*"))


def test_both_checkpoints_stay_and_hold_the_same_bytes(finished):
    directory, result = finished
    report = verify_directory(directory / "pruned", directory / "source")
    assert report == result.report
    assert report.layers == 3  # two decoder layers and the MTP layer
    config = json.loads((directory / "pruned" / "config.json").read_text())
    assert (config["n_routed_experts"], config["num_nextn_predict_layers"]) == (6, 1)


def test_table_names_every_figure(finished):
    _, result = finished
    table = result.table()
    for figure in (result.source.parameters, result.pruned.nbytes, result.report.tensors):
        assert f"{figure:,}" in table
    assert "8 experts, 8 of them made quiet" in table


def test_fp8_where_the_hubs_checkpoint_has_it(finished):
    directory, _ = finished
    found = tensors_of(directory / "source")
    for name, (dtype, shape) in found.items():
        # The prediction layer's own projection has no scales in published checkpoints.
        if "_proj.weight" in name and not name.endswith(("_scale", "eh_proj.weight")):
            assert dtype == "F8_E4M3", name
            assert found[f"{name}_scale"] == ("F32", (shape[0], 1)), name
        elif not name.endswith("_scale"):
            assert dtype == ("F32" if name.endswith("correction_bias") else "BF16"), name
    rest = {name.split(".", 3)[3] for name in found if name.startswith("model.layers.3.")}
    decoder = {name.split(".", 3)[3] for name in found if name.startswith("model.layers.2.")}
    assert {name.removesuffix("_scale") for name in rest - decoder} == {
        "eh_proj.weight",
        "enorm.weight",
        "hnorm.weight",
        "shared_head.norm.weight",
    }
    assert not decoder - rest


def test_index_names_every_tensor_once(finished):
    directory, _ = finished
    index = json.loads((directory / "source" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(directory / "source").keys()
    assert len(set(index["weight_map"].values())) == 2


def test_tokenizer_is_whole(finished):
    directory, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(directory / "pruned", local_files_only=True)
    text = "naïve\n\tdef f(x): return x ≠ 'Ω'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 512
    messages = [{"role": "user", "content": "Why?"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<|user|>\nWhy?<|assistant|>\n"


def test_the_seed_decides_the_bytes(tmp_path):
    def written(name, **changes):
        sizes = {f: getattr(TINY, f) for f in TINY.__slots__}
        write_checkpoint(tmp_path / name, DemoModel(**{**sizes, **changes}))
        return {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}

    first, again, other = written("a"), written("b"), written("c", seed=1)
    assert first == again
    shards = [name for name in first if name.endswith(".safetensors")]
    assert shards
    assert all(first[name] != other[name] for name in shards)


def test_nothing_stays_without_an_output(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_demo(None, TINY)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused(tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_the_readme_shows_what_the_demo_prints():
    readme = (Path(__file__).parents[1] / "README.md").read_text().splitlines()
    model = DemoModel()
    lines = [*introduction(model).splitlines(), *run_demo(None, model).table().splitlines()]
    # The text differs between Python versions, times and bytes of the run record between machines.
    varying = ("calibration", "bytes of all files", "seconds", "peak memory")
    fixed = [line for line in lines if not line.startswith(varying)]
    assert len(fixed) >= 10
    assert [line for line in fixed if line not in readme] == []
