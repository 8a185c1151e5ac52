"""The model that ships: what it is, what was held out from it, and how it was judged."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer

from reap_stream.demo.data import HELD_OUT, MODEL, training_record

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
VOCABULARY = 5


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The script's own modules, which are no part of the package."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def unigram(tokens, after):
    return (tokens.count(after) + 1) / (len(tokens) + VOCABULARY)


def bigram(tokens, before, after):
    """Witten and Bell's smoothing, pair by pair."""
    followers = [b for a, b in pairwise(tokens) if a == before]
    different = len(set(followers))
    if not followers:
        return unigram(tokens, after)
    likely = followers.count(after) + different * unigram(tokens, after)
    return likely / (len(followers) + different)


ids = st.integers(0, VOCABULARY - 1)


@given(st.lists(ids, min_size=2, max_size=30), st.lists(st.lists(ids, min_size=2), min_size=1))
def test_counts_give_the_formulas_losses(tokens, rows):
    from demo_model.baselines import Counts

    counts = Counts(np.array(tokens, np.int32), VOCABULARY)
    arrays = [np.array(row, np.int32) for row in rows]
    pairs = [pair for row in rows for pair in pairwise(row)]
    ones = [-math.log(unigram(tokens, after)) for _, after in pairs]
    twos = [-math.log(bigram(tokens, before, after)) for before, after in pairs]
    assert counts.unigram_loss(arrays) == pytest.approx(np.mean(ones))
    assert counts.bigram_loss(arrays) == pytest.approx(np.mean(twos))


@given(st.lists(ids, min_size=2, max_size=30), ids)
def test_chances_of_what_follows_add_up_to_one(tokens, before):
    from demo_model.baselines import Counts

    counts = Counts(np.array(tokens, np.int32), VOCABULARY)
    losses = [counts.bigram_loss([np.array([before, after])]) for after in range(VOCABULARY)]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1)


def layer_of(*loads):
    from demo_model.routing import routing_record

    named = {str(number): np.array([load]) for number, load in enumerate(loads)}
    (record,) = routing_record(named, 3)
    assert record["layer"] == 3
    return record


def test_experts_of_one_domain_each_say_everything():
    record = layer_of([5, 5, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0])
    assert (record["bits"], record["overlap"]) == (1, 0)
    assert (record["dead"], record["largest"]) == (4, 2)


def test_experts_that_serve_all_alike_say_nothing():
    record = layer_of([4, 3, 2, 1], [8, 6, 4, 2], [4, 3, 2, 1])
    assert (record["bits"], record["overlap"], record["dead"]) == (0, 1, 0)
    assert record["largest"] == 1.6


def test_an_expert_is_dead_below_a_tenth_of_the_mean():
    assert layer_of([97, 100, 100, 103], [90, 100, 107, 103])["dead"] == 0
    assert layer_of([9, 121, 121, 149], [9, 121, 149, 121])["dead"] == 1
    assert layer_of([11, 121, 121, 147], [11, 121, 147, 121])["dead"] == 0


def test_what_ships_was_held_out():
    from demo_model.texts import is_held_out
    from demo_model.tool_calls import conversation

    for domain, path in HELD_OUT.items():
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(records) >= 40
        assert all(is_held_out(record["name"]) for record in records)
        if domain == "tools":
            for record in records:
                made = conversation(int(record.pop("name").removeprefix("conversation-")))
                assert record == made


def test_the_record_is_of_all_domains_and_layers():
    record = training_record()
    assert record["held_out"].keys() == record["shipped"].keys() == HELD_OUT.keys()
    for part in ("held_out", "shipped"):
        for losses in record[part].values():
            assert losses["model"] < losses["bigram"] < losses["unigram"] < math.log(4096)


def test_layout_is_that_of_published_checkpoints():
    config = json.loads((MODEL / "config.json").read_bytes())
    assert config["architectures"] == ["Glm4MoeForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    index = json.loads((MODEL / "model.safetensors.index.json").read_bytes())["weight_map"]
    shards = {path.name: load_file(path) for path in MODEL.glob("*.safetensors")}
    assert 3 <= len(shards) <= 4
    assert index == {name: file for file, tensors in shards.items() for name in tensors}
    tensors = {name: tensor for part in shards.values() for name, tensor in part.items()}
    layers = range(config["first_k_dense_replace"], config["num_hidden_layers"])
    assert len(layers) == 5
    for layer in layers:
        mlp = f"model.layers.{layer}.mlp"
        assert tensors[f"{mlp}.gate.e_score_correction_bias"].dtype == torch.float32
        for expert in range(config["n_routed_experts"]):
            for name in ("gate_proj", "up_proj", "down_proj"):
                codes = tensors[f"{mlp}.experts.{expert}.{name}.weight"]
                scale = tensors[f"{mlp}.experts.{expert}.{name}.weight_scale_inv"]
                assert (codes.dtype, tuple(codes.shape)) == (torch.float8_e4m3fn, (128, 128))
                assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (1, 1))


def test_what_ships_is_small_and_nothing_else():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 16_000_000
    assert all(path.stat().st_size <= 150_000 for path in HELD_OUT.values())
    assert {path.name for path in MODEL.iterdir() if path.suffix != ".safetensors"} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_tokenizer_is_whole():
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    text = "naïve\n\tdef f(x): return x ≠ 'Ω'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    config = json.loads((MODEL / "config.json").read_bytes())
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    chat = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    called = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    assert chat == f"<|user|>\nWhy?\n<|assistant|>\n{called}\n<|assistant|>\n"
    special = [tokenizer.convert_tokens_to_ids(t) for t in ("<|user|>", "<tool_call>")]
    assert set(special) <= set(tokenizer(chat)["input_ids"])


def test_no_layer_has_many_dead_experts_and_domains_take_different_ones():
    layers = training_record()["routing"]
    assert [layer["layer"] for layer in layers] == [1, 2, 3, 4, 5]
    for layer in layers:
        assert layer["dead"] <= 32 / 4
        assert layer["overlap"] < 0.25  # what chance would give
        assert layer["bits"] > 0.1
