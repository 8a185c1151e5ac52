"""What cannot be carried out is refused before any work: status 2, and a message that says why."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from reap_stream.cli import main
from tests.builders import (
    load_tensors,
    read_config,
    save,
    tiny_model,
    write_checkpoint,
)
from tests.families import Family


@pytest.fixture
def refuse(tmp_path, calibration, capsys):
    """Runs `prune` and checks that it refuses, says why, and leaves nothing behind."""

    def run(source, *patterns, arguments=("--keep", "4"), specs=calibration[:1]):
        output = tmp_path / "output"
        before = sorted(tmp_path.rglob("*"))
        given = [item for spec in specs for item in ("--calibration", str(spec))]
        fixed = ["prune", str(source), "--output", str(output), "--device", "cpu"]
        status = main([*fixed, *given, *arguments])
        message = capsys.readouterr().err
        assert status == 2, message
        assert message.startswith("reap-stream: ")
        for pattern in patterns:
            assert re.search(pattern, message), (pattern, message)
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


def test_a_model_without_experts(refuse, tmp_path_factory):
    source = save(tiny_model(Family("llama")), tmp_path_factory.mktemp("llama"))
    refuse(source, "LlamaForCausalLM has no Mixture-of-Experts layers")


def test_code_of_the_checkpoint(refuse, tiny, tmp_path_factory):
    config = read_config(tiny("glm4_moe"))
    config["model_type"] = "never_heard_of"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    directory = tmp_path_factory.mktemp("code")
    (directory / "code.py").write_text("raise SystemExit('the code ran')")
    source = write_checkpoint(directory, load_tensors(tiny("glm4_moe")), config)
    refuse(source, "never_heard_of", "auto_map", "--trust-remote-code")


def test_a_model_type_nobody_knows(refuse, tiny, tmp_path_factory):
    config = {**read_config(tiny("glm4_moe")), "model_type": "never_heard_of"}
    directory = tmp_path_factory.mktemp("unknown")
    source = write_checkpoint(directory, load_tensors(tiny("glm4_moe")), config)
    refuse(source, "never_heard_of", r"config\.json")


@pytest.mark.parametrize(
    ("family_id", "arguments", "pattern"),
    [
        ("glm4_moe", ["--keep", "1"], r"(?s)\b1\b.*\b2\b"),
        ("glm4_moe", ["--sparsity", "0.9"], r"(?s)\b1\b.*\b2\b"),
        ("deepseek_v3", ["--keep", "2"], "keep at least 4"),
        ("deepseek_v3", ["--keep", "5"], "keep 4 or 6"),
        ("glm4_moe", ["--keep", "9"], "cannot keep 9 of 8"),
        ("glm4_moe", ["--keep", "0"], "cannot keep 0 of 8"),
        ("glm4_moe", ["--keep", "4,4"], "two targets keep 4"),
        ("glm4_moe", ["--sparsity", "1.0"], "out of range"),
        ("glm4_moe", ["--sparsity", "much"], "'much' is no number"),
        ("glm4_moe", ["--keep", "4", "--fp8-experts-only"], "no meaning with --weights keep"),
        ("glm4_moe", ["--keep", "4", "--resume", "--overwrite"], "give one of them"),
        ("glm4_moe", ["--keep", "4", "--resume"], "no half-done job"),
        ("glm4_moe", ["--keep", "4,6", "--propagate", "pruned"], "one target at a time"),
        ("glm4_moe", ["--keep", "4", "--memory", "much"], "'much' is not a number of bytes"),
        ("glm4_moe", ["--keep", "4", "--batch-tokens", "0"], "--batch-tokens is 0"),
        ("glm4_moe", ["--keep", "4", "--device", "cuda:99"], "cuda:99"),
        ("glm4_moe", ["--keep", "4", "--device", "abacus"], "abacus"),
    ],
)
def test_targets_and_settings(family_id, arguments, pattern, refuse, tiny):
    refuse(tiny(family_id), pattern, arguments=arguments)


@pytest.mark.parametrize(
    "missing",
    [
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.shared_experts.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor(missing, refuse, tiny, tmp_path_factory):
    tensors = load_tensors(tiny("glm4_moe"))
    del tensors[missing]
    directory = tmp_path_factory.mktemp("missing")
    source = write_checkpoint(directory, tensors, read_config(tiny("glm4_moe")))
    refuse(source)


def test_all_experts_of_a_layer_missing(refuse, tiny, tmp_path_factory):
    tensors = load_tensors(tiny("glm4_moe"))
    left = {name: t for name, t in tensors.items() if "layers.2.mlp.experts" not in name}
    directory = tmp_path_factory.mktemp("missing")
    source = write_checkpoint(directory, left, read_config(tiny("glm4_moe")))
    refuse(source, r"layers\.2\.mlp\.experts")


@pytest.mark.parametrize(
    "changes",
    [
        {"n_routed_experts": 6},
        {"n_routed_experts": 10},
        {"moe_intermediate_size": 24},
        {"hidden_size": 40},
        {"intermediate_size": 40},
        {"num_attention_heads": 8},
        {"num_hidden_layers": 4},
        {"n_shared_experts": 2},
    ],
    ids="-".join,
)
def test_config_and_weights_of_two_models(changes, refuse, tiny, tmp_path_factory):
    config = {**read_config(tiny("glm4_moe")), **changes}
    directory = tmp_path_factory.mktemp("two")
    source = write_checkpoint(directory, load_tensors(tiny("glm4_moe")), config)
    refuse(source)


def test_a_budget_that_holds_nothing_gives_both_numbers(refuse, tiny):
    message = refuse(tiny("glm4_moe"), arguments=["--keep", "4", "--memory", "10MiB"])
    found = re.search(r"budget is ([\d.]+) GiB.*at least ([\d.]+) GiB", message)
    assert found, message
    assert float(found[1]) < float(found[2])


def test_an_output_that_exists(refuse, tiny, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "precious").write_text("mine")
    refuse(tiny("glm4_moe"), "output: exists already", "--overwrite")


def test_an_output_inside_its_source(tiny, calibration, capsys):
    source = tiny("glm4_moe")
    arguments = ["--output", str(source / "pruned"), "--keep", "4", "--calibration", calibration[0]]
    assert main(["prune", str(source), *arguments]) == 2
    assert "inside the source" in capsys.readouterr().err
    assert not (source / "pruned").exists()


@pytest.mark.parametrize(
    ("array", "pattern"),
    [
        (np.full((2, 5), 96), r"token id 96 .*vocabulary of 96"),
        (np.array([[3, -1]]), "token id -1"),
        (np.ones((2, 5)), "float64"),
        (np.ones(5, np.int64), r"\[5\]"),
    ],
)
def test_token_ids_that_are_not_the_models(array, pattern, refuse, tiny, tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, array)
    refuse(tiny("glm4_moe"), re.escape(str(path)), pattern, specs=[path])


def test_text_without_a_tokenizer(refuse, tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "hello"}) + "\n")
    refuse(tiny("glm4_moe"), "tokenizer", specs=[path])


def test_calibration_data_that_is_not_there(refuse, tiny, tmp_path):
    refuse(tiny("glm4_moe"), "nowhere.npy", specs=[tmp_path / "nowhere.npy"])


def test_a_model_that_is_not_there(refuse, tmp_path):
    refuse(tmp_path / "nowhere", "nowhere")


@pytest.mark.parametrize(
    ("command", "pattern"),
    [
        (["prune"], "the following arguments are required"),
        (["prune", "m", "--output", "o", "--calibration", "c"], "--sparsity"),
        (["prune", "m", "--keep", "1", "--sparsity", "0.5"], "not allowed with"),
        (["frobnicate"], "invalid choice"),
    ],
)
def test_usage(command, pattern, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert pattern in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", []),
        ("model_type", None),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": 128}),
        ("quantization_config", {"weight_block_size": [128, True]}),
        ("quantization_config", "fp8"),
        ("text_config", "x"),
        ("architectures", "Glm"),
        ("architectures", [5]),
    ],
)
def test_config_values_of_the_wrong_type(key, value, refuse, tiny, tmp_path_factory, capsys):
    config = {**read_config(tiny("glm4_moe")), key: value}
    directory = tmp_path_factory.mktemp("hostile")
    source = write_checkpoint(directory, load_tensors(tiny("glm4_moe")), config)
    refuse(source, r"config\.json")
    assert main(["plan", str(source), "--keep", "4", "--device", "cpu"]) == 2
    assert main(["inspect", str(source)]) == 2
    assert "config.json" in capsys.readouterr().err
