"""What `inspect` says, against the files themselves; and that asking for help costs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from reap_stream.cli import main
from reap_stream.errors import UnsupportedError
from reap_stream.inspection import inspect_model
from tests.builders import add_mtp, load_tensors, quantise, read_config, write_checkpoint
from tests.families import FAMILIES

INDEX = "model.safetensors.index.json"
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_counts_are_those_of_the_files(family, tiny):
    directory = tiny(family.id)
    tensors = load_tensors(directory)
    found = inspect_model(directory)
    assert found.facts.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert found.tensors == len(tensors)
    assert sum(entry["tensors"] for entry in found.dtypes.values()) == len(tensors)
    assert sum(entry["bytes"] for entry in found.dtypes.values()) == found.facts.bytes
    assert found.shards == len(list(directory.glob("*.safetensors")))
    assert sum(found.formats.values()) == len(tensors)
    assert found.refusals.count == 0
    layers = [n for run in found.layers for n in range(run.first, run.last + 1)]
    assert layers == list(range(found.facts.num_layers))
    moe = [run.last - run.first + 1 for run in found.layers if run.kind == "moe"]
    assert sum(moe) == found.facts.moe_layers


@pytest.mark.parametrize(
    ("family_id", "kinds"),
    [
        ("glm4_moe", [(0, 0, "dense"), (1, 2, "moe")]),
        ("qwen3_moe", [(0, 0, "moe"), (1, 1, "dense"), (2, 2, "moe")]),
        ("mixtral", [(0, 2, "moe")]),
    ],
)
def test_layers_are_told_apart(family_id, kinds, tiny):
    directory = tiny(family_id)
    runs = inspect_model(directory).layers
    assert [(run.first, run.last, run.kind) for run in runs] == kinds
    tensors = load_tensors(directory)
    for run in runs:
        prefixes = tuple(f"model.layers.{n}." for n in range(run.first, run.last + 1))
        own = sum(t.nbytes for name, t in tensors.items() if name.startswith(prefixes))
        assert run.bytes == own


def test_the_largest_layer_is_the_largest(tiny):
    directory = tiny("qwen3_moe")
    tensors = load_tensors(directory)
    layers = [
        sum(t.nbytes for name, t in tensors.items() if name.startswith(f"model.layers.{n}."))
        for n in range(3)
    ]
    assert inspect_model(directory).facts.largest_layer_bytes == max(layers)


@pytest.mark.parametrize("scheme", ["block", "channel"])
def test_formats_are_counted(scheme, tiny, tmp_path):
    stored = quantise(tiny("qwen3_moe"), tmp_path, scheme, torch.float32, 24)[0]
    tensors = load_tensors(stored)
    codes = [name for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn]
    found = inspect_model(stored)
    assert found.formats == {"fp8": len(codes), "plain": len(tensors) - 2 * len(codes)}
    assert found.dtypes["F8_E4M3"]["tensors"] == len(codes)
    method = {"block": "fp8", "channel": "compressed-tensors"}[scheme]
    assert found.quantization["quant_method"] == method


def test_refusals_name_file_and_tensor(tiny, tmp_path, capsys):
    stored = quantise(tiny("qwen3_moe"), tmp_path, "channel", torch.float32, 0)[0]
    tensors = load_tensors(stored)
    lost = [f"model.layers.{n}.self_attn.q_proj.weight_scale" for n in range(3)]
    lost.append("model.layers.0.mlp.experts.3.up_proj.weight_scale")
    kept = {name: tensor for name, tensor in tensors.items() if name not in lost}
    damaged = write_checkpoint(tmp_path / "damaged", kept, read_config(stored))
    found = inspect_model(damaged)
    assert found.refusals.count == len(lost)
    assert 1 <= len(found.refusals.reasons) < len(lost)
    assert all("model.safetensors" in reason for reason in found.refusals.reasons)
    assert main(["inspect", str(damaged)]) == 0
    assert "cannot run: 4 weights" in capsys.readouterr().out
    assert main(["inspect", str(damaged), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forward_runs"] is False


def test_mtp_layers_and_what_the_config_says_of_them(tiny, tmp_path):
    plain = tiny("glm4_moe")
    absent = inspect_model(plain)
    assert (absent.facts.mtp_layers, absent.config_mtp_layers) == (0, 1)
    assert any("holds none" in note for note in absent.notes)
    source = add_mtp(plain, tmp_path / "with", "nextn")
    present = inspect_model(source)
    assert (present.mtp_layer_indices, present.config_mtp_layers) == ((3,), 1)
    assert present.notes == ()
    silent = {**read_config(source), "num_nextn_predict_layers": 0}
    unsaid = inspect_model(write_checkpoint(tmp_path / "unsaid", load_tensors(source), silent))
    assert any("config.json does not" in note for note in unsaid.notes)


def test_groups_and_tied_embeddings(tiny):
    found = inspect_model(tiny("deepseek_v3"))
    assert (found.groups, found.topk_groups, found.tied_embeddings) == (2, 1, False)
    tied = tiny("qwen3_moe", tie_word_embeddings=True)
    assert inspect_model(tied).tied_embeddings
    assert "lm_head.weight" not in load_tensors(tied)


def test_tied_embeddings_are_described_once(tiny, tmp_path):
    tied = tiny("qwen3_moe", tie_word_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(read_config(tied)))
    assert inspect_model(tmp_path).facts.bytes == inspect_model(tied).facts.bytes


def test_side_files_are_listed(tiny, tmp_path):
    source = tiny("mixtral")
    directory = write_checkpoint(tmp_path, load_tensors(source), read_config(source))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "consolidated.pth").write_bytes(b"pickle")
    found = inspect_model(directory)
    assert found.side_files == ("tokenizer.json",)
    assert found.skipped_files == ("consolidated.pth",)


def test_an_index_tells_the_shards(tiny, tmp_path):
    source = tiny("mixtral")
    (tmp_path / "config.json").write_text(json.dumps(read_config(source)))
    assert inspect_model(tmp_path).shards == 0
    names = list(load_tensors(source))
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    found = inspect_model(tmp_path)
    assert (found.shards, found.tensors, found.facts.estimated) == (3, len(names), True)


def test_a_dense_model_is_refused(tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32}
    small = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({**config, **small, "vocab_size": 96}))
    with pytest.raises(UnsupportedError, match="no Mixture-of-Experts layers"):
        inspect_model(tmp_path)


def test_the_text_is_short_and_silent_on_errors(tiny, capsys):
    assert main(["inspect", str(tiny("glm4_moe"))]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "0 dense" in captured.out
    assert "1-2 MoE" in captured.out
    assert max(map(len, captured.out.splitlines())) < 160


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["inspect", "--help"], ["plan", "--help"], ["--version"]],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments):
    program = (
        "import json, sys\n"
        "from reap_stream.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        f"    print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    *said, imported = done.stdout.strip().splitlines()
    assert json.loads(imported) == []
    assert done.stderr == ""
    text = "\n".join(said)
    if arguments[0] == "--help":
        assert all(command in text for command in ("inspect", "plan", "prune"))
    if arguments[0] == "plan":
        assert all(option in text for option in ("MODEL", "--sparsity", "--keep", "--json"))
    if arguments[0] == "inspect":
        assert all(option in text for option in ("MODEL", "--json"))
