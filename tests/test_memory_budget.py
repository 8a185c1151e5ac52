"""A checkpoint much larger than the budget is pruned within it, and comes out the same."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reap_stream.checkpoint.reader import Reader
from reap_stream.demands import Demands
from reap_stream.memory import BudgetError, plan_memory
from reap_stream.model.opened import open_model
from reap_stream.model.skeleton import KEPT_SHAPES, Skeleton
from reap_stream.preparation import memory_for
from reap_stream.resident import peak_resident_nbytes, resident_nbytes
from tests.builders import tiny_config
from tests.engine import read_kept, run_settings
from tests.evaluation import make_scores
from tests.families import BY_ID

MIB = 2**20
# 5 MoE layers of 64 experts of 3 MiB: 200 MB a layer, 1 GB in all.
WIDTHS = {
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "intermediate_size": 1024,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
TOKENS = (24, 256)
# The allocator's free lists, and what libraries take beyond what is set aside for them.
SLACK = 32 * MIB
SCRIPT = """
import sys
from pathlib import Path
from reap_stream.cli import main
status = main(sys.argv[1:])
fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print("peak", int(fields["VmHWM"].split()[0]) * 1024)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 1 GB, a shard a layer."""
    directory = tmp_path_factory.mktemp("large")
    config = tiny_config(BY_ID["glm4_moe"], **WIDTHS).to_dict()
    config["architectures"] = ["Glm4MoeForCausalLM"]
    config["dtype"] = "bfloat16"
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator).mul_(0.05).to(torch.bfloat16)

    ones = torch.ones(1024, dtype=torch.bfloat16)
    shards = [{"model.embed_tokens.weight": noise(96, 1024), "lm_head.weight": noise(96, 1024)}]
    shards[0]["model.norm.weight"] = ones
    shards += [
        layer_tensors(f"model.layers.{layer}", noise, ones, dense=layer == 0)
        for layer in range(WIDTHS["num_hidden_layers"])
    ]
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, directory / name)
        weight_map.update(dict.fromkeys(tensors, name))
    total = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert total > 10**9
    return directory


def layer_tensors(prefix, noise, ones, *, dense):
    tensors = {
        f"{prefix}.self_attn.q_proj.weight": noise(512, 1024),
        f"{prefix}.self_attn.k_proj.weight": noise(128, 1024),
        f"{prefix}.self_attn.v_proj.weight": noise(128, 1024),
        f"{prefix}.self_attn.o_proj.weight": noise(1024, 512),
        f"{prefix}.input_layernorm.weight": ones,
        f"{prefix}.post_attention_layernorm.weight": ones,
    }
    mlps = {"mlp": 1024} if dense else {"mlp.shared_experts": 512}
    if not dense:
        mlps |= {f"mlp.experts.{expert}": 512 for expert in range(64)}
        tensors[f"{prefix}.mlp.gate.weight"] = noise(64, 1024)
        tensors[f"{prefix}.mlp.gate.e_score_correction_bias"] = torch.zeros(64)
    for name, width in mlps.items():
        for part in ("gate_proj", "up_proj"):
            tensors[f"{prefix}.{name}.{part}.weight"] = noise(width, 1024)
        tensors[f"{prefix}.{name}.down_proj.weight"] = noise(1024, width)
    return tensors


def prune(source, output, calibration, *options):
    """Prunes in a process of its own; the peak of its resident memory."""
    arguments = ["prune", str(source), "--output", str(output), "--keep", "32"]
    arguments += ["--calibration", str(calibration), "--device", "cpu", *options]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rsplit("peak ", 1)[1])


@pytest.mark.slow
def test_a_large_checkpoint_is_pruned_within_a_small_budget(large, tmp_path):
    calibration = tmp_path / "ids.npy"
    np.save(calibration, np.random.default_rng(0).integers(3, 96, TOKENS))
    options = ("--compute-dtype", "bfloat16", "--batch-tokens", "512")
    budget = 560 * MIB
    tight, ample = tmp_path / "tight", tmp_path / "ample"
    peak = prune(large, tight, calibration, *options, "--memory", f"{budget // MIB}MiB")
    assert peak < budget + SLACK
    record = json.loads((tight / "reap" / "run.json").read_text())
    # Not all experts of a layer had room, so they were streamed.
    assert record["memory"]["expert_slots"] < 64
    assert record["memory"]["predicted_peak_nbytes"] <= budget
    assert abs(record["peak_resident_nbytes"] - peak) < 16 * MIB

    assert prune(large, ample, calibration, *options, "--memory", "4GiB") > peak
    assert json.loads((ample / "reap" / "run.json").read_text())["memory"]["expert_slots"] == 64
    assert read_kept(tight) == read_kept(ample)
    for path in ample.glob("*.safetensors"):
        assert path.read_bytes() == (tight / path.name).read_bytes()


def evaluate(source, scores, text, output, *options):
    """Evaluates two prunings in a process of its own; its peak, and what was found."""
    arguments = ["eval", str(source), "--scores", str(scores), "--keep", "32,48"]
    arguments += ["--text", str(text), "--device", "cpu", "--output", str(output), *options]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rsplit("peak ", 1)[1]), json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_candidates_are_evaluated_within_a_small_budget(large, tmp_path):
    text = tmp_path / "ids.npy"
    np.save(text, np.random.default_rng(0).integers(3, 96, TOKENS))
    scores = make_scores(large, tmp_path / "scores.safetensors")
    options = ("--compute-dtype", "bfloat16", "--batch-tokens", "2048", "--memory")
    budget = 640 * MIB
    peak, tight = evaluate(large, scores, text, tmp_path / "tight.json", *options, "640MiB")
    assert peak < budget + SLACK
    assert tight["predicted_peak_nbytes"] <= budget
    assert tight["settings"]["expert_slots"] < 64
    assert any("experts of a layer; the others were read again" in note for note in tight["notes"])

    more, ample = evaluate(large, scores, text, tmp_path / "ample.json", *options, "4GiB")
    assert more > peak
    # One reading of everything for all three.
    weights = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert ample["read_nbytes"] < 1.02 * weights < tight["read_nbytes"]
    for mine, theirs in zip(tight["candidates"], ample["candidates"], strict=True):
        assert mine["layers"] == theirs["layers"]
        assert mine["all"]["loss"] == pytest.approx(theirs["all"]["loss"], rel=1e-5)


DEMANDS = Demands(
    dense=10**6,
    largest_tensor=10**6,
    slot=10**6,
    fused=0,
    expert=10**6,
    decode=0,
    per_token=10**5,
    num_experts=8,
    longest_row=64,
)
CPU = torch.device("cpu")


def peak_of(demands, **options):
    defaults = {"hidden_nbytes": 10**6, "budget": 2**40, "batch_tokens": 64, "device": CPU}
    return plan_memory(demands, **{**defaults, **options}).peak_host


def test_a_row_longer_than_a_batch_is_counted(monkeypatch):
    monkeypatch.setattr("reap_stream.memory.resident_nbytes", lambda: 0)
    long = replace(DEMANDS, longest_row=4096)
    assert peak_of(long) - peak_of(DEMANDS) == (4096 - 64) * DEMANDS.per_token
    assert peak_of(replace(DEMANDS, longest_row=8)) == peak_of(DEMANDS)
    # Smaller batches would not help: the row runs anyhow.
    with pytest.raises(BudgetError, match=r"batches of 4096 tokens; .* lower --sequence-length"):
        peak_of(long, budget=300 * MIB)


def test_attention_without_a_fused_kernel_is_counted(tiny, monkeypatch):
    monkeypatch.setattr("reap_stream.memory.resident_nbytes", lambda: 0)
    rows, width, heads = 8, 2048, 4

    def growth(family):
        run = run_settings(tiny(family), ("builtin",), batch_tokens=rows * width, memory=2**36)
        model = open_model(run.model, dtype=torch.float32)
        peaks = [
            memory_for(model, rows * width, CPU, run, longest_row=longest).peak_host
            for longest in (1, width)
        ]
        return peaks[1] - peaks[0]

    # Scores, the cut of their largest, and their softmax live at once in float32.
    assert growth("gpt_oss") > 3 * rows * heads * width**2 * 4
    assert growth("qwen3_moe") == 0


def test_calls_of_few_shapes_are_kept_and_the_others_made_anew(tiny):
    model = open_model(tiny("gpt_oss"), dtype=torch.float32)
    generator = np.random.default_rng(0)
    batches = [
        generator.integers(3, 96, (2, width)) for width in range(12, 12 - KEPT_SHAPES - 2, -1)
    ]
    with Reader() as reader, torch.no_grad():
        skeleton = Skeleton(model, reader, CPU)
        first = mask_of(skeleton.embed(batches[0])[1])
        expected, gone = first.clone(), weakref.ref(first)
        del first
        for batch in batches[1:]:
            skeleton.embed(batch)
        assert gone() is None
        assert torch.equal(mask_of(skeleton.calls(batches[0])), expected)
        for batch in batches:
            assert mask_of(skeleton.calls(batch)).shape[-1] == batch.shape[1]


def mask_of(calls):
    return calls[0].kwargs["attention_mask"]


def test_the_peak_is_this_process_own():
    # A process started by a large one must not report the other's memory.
    ballast = np.ones(400 * MIB, np.uint8)
    code = "from reap_stream.resident import peak_resident_nbytes as p; print(p())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < resident_nbytes() - 100 * MIB
    assert peak_resident_nbytes() >= ballast.nbytes


def test_streams_and_what_is_handed_on_count(tiny):
    def plan(family_id):
        model = open_model(tiny(family_id), dtype=torch.float32)
        settings = run_settings(tiny(family_id), ["builtin"], memory=2**40)
        return memory_for(model, 1000, CPU, settings, longest_row=50)

    assert plan("glm4_moe").hidden_nbytes == 1000 * 32 * 4
    assert plan("hy_v4").hidden_nbytes >= 1000 * 3 * 32 * 4
    # Beside hidden states the choice of 8 tokens, int32, goes on.
    assert plan("glm_moe_dsa").hidden_nbytes == 1000 * (32 * 4 + 8 * 4)
