"""Several ranks give what one gives: the same experts, the same bytes, the same sums."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.numpy import load_file

from reap_stream import preparation
from reap_stream.checkpoint.job import RANKS_NAME, Job
from reap_stream.checkpoint.lock import check_left
from tests.builders import add_mtp, quantise
from tests.job_directories import open_files
from tests.killing import run
from tests.rank_processes import on_two_machines, printed, run_ranks
from tests.rank_results import OF_THE_RUN, assert_same_scores, decided
from tests.resuming import WIDE, contents, observe_arguments, prune_arguments

# The last two hand on more than hidden states from layer to layer.
FAMILIES = ["jamba", "minimax_m2", "qwen3_next", "glm_moe_dsa", "zaya"]


def assert_same(one, several):
    expected = decided(one)
    assert decided(several) == expected
    assert any(path.suffix == ".safetensors" for path in expected)
    scores = [path.relative_to(one) for path in one.rglob("scores.safetensors")]
    assert scores
    for path in scores:
        assert_same_scores(several / path, one / path)


@pytest.fixture
def compare(calibration, tmp_path):
    """Prunes with one process and with each number of ranks; gives the run's records."""

    def call(source, sizes, *options, prepare=None):
        one, log = tmp_path / "one", tmp_path / "log"
        assert run(prune_arguments(source, one, calibration, *options), log) == 0, log.read_text()
        records = []
        for size in sizes:
            output = tmp_path / f"ranks-{size}"
            arguments = prune_arguments(source, output, calibration, *options)
            statuses = run_ranks(arguments, log, size, prepare=prepare)
            assert statuses == [0] * size, printed(log, size)
            assert_same(one, output)
            path = next(output.rglob("run.json"))
            records.append((json.loads(path.read_bytes()), printed(log, size)))
        return records

    return call


def test_two_and_three_ranks_write_what_one_writes(tiny, compare):
    for size, (record, texts) in zip((2, 3), compare(tiny("glm4_moe"), (2, 3)), strict=True):
        ranks = record["ranks"]
        assert ranks["count"] == size
        assert ranks["of_machines"] == [size]
        assert sum(ranks["tokens"]) == record["calibration"]["tokens"]
        for total in ("read_nbytes", "written_nbytes"):
            assert sum(ranks[total]) == record[total]
            assert min(ranks[total]) > record[total] / size / 2
        assert max(ranks["peak_resident_nbytes"]) == record["peak_resident_nbytes"]
        assert f"in the largest of {size} ranks" in texts[0]
        # One of them speaks.
        assert not any(texts[1:])


def test_fp8_with_two_prediction_layers(tiny, compare, tmp_path):
    source = add_mtp(tiny("glm4_moe"), tmp_path / "bf16", "nextn", 2)
    stored, _ = quantise(source, tmp_path, "channel", torch.bfloat16, 0)
    compare(stored, (2,))
    scores = load_file(tmp_path / "ranks-2" / "reap" / "scores.safetensors")
    assert {"layers.3.tokens", "layers.4.tokens"} <= scores.keys()


def test_several_targets_and_experts_chosen_after_the_pass(tiny, compare):
    compare(tiny("glm4_moe"), (3,), "--keep", "4,6", "--protect", "super")


def test_weights_in_another_format(tiny, compare):
    compare(tiny("glm4_moe", **WIDE), (2,), "--weights", "fp8")


def test_later_layers_on_pruned_ones(tiny, compare):
    compare(tiny("deepseek_v3"), (2,), "--propagate", "pruned")


def test_more_ranks_than_batches(tiny, compare):
    # The last one counts: all rows in one batch.
    record, texts = compare(tiny("gpt_oss"), (3,), "--batch-tokens", "100000")[0]
    assert record["ranks"]["tokens"] == [record["calibration"]["tokens"], 0, 0]
    assert "note: 2 of 3 ranks had no batch of calibration rows to run" in texts[0]


def test_two_machines_write_different_shards(tiny, compare):
    records = compare(tiny("glm4_moe"), (3,), prepare=on_two_machines)
    assert records[0][0]["ranks"]["of_machines"] == [2, 1]
    assert min(records[0][0]["ranks"]["written_nbytes"]) > 0


def spilling(rank):
    """Lets memory be short: hidden states in files, few experts at a time."""
    plan = preparation.plan_memory

    def short(*demands, **options):
        return replace(plan(*demands, **options), spill=True, expert_slots=3)

    preparation.plan_memory = short


def spilling_and_watched(rank):
    """As `spilling`; what is deleted in the end must not be open any more, on any rank."""
    spilling(rank)
    discard = Job.discard

    def watched(job):
        check_left(job.path(RANKS_NAME))
        assert open_files(job.directory) == [str(job.path("lock"))]
        discard(job)

    Job.discard = watched


def test_hidden_states_in_files(tiny, compare):
    record, _ = compare(tiny("minimax_m2"), (2,), prepare=spilling_and_watched)[0]
    assert record["memory"]["hidden_states_in_file"]
    assert record["memory"]["expert_slots"] == 3


@pytest.mark.gpu
def test_two_ranks_share_a_gpu(tiny, compare):
    compare(tiny("glm4_moe"), (2,), "--device", "cuda:0")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tiny, compare):
    compare(tiny(family), (2, 3), "--mtp", "drop")


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["fp8-channel", "bf16"])
def test_formats(weights, tiny, compare):
    compare(tiny("glm4_moe", **WIDE), (2, 3), "--weights", weights, "--keep", "4,6")


def test_observed_scores(tiny, calibration, tmp_path):
    source, log = tiny("glm4_moe"), tmp_path / "log"
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert run(observe_arguments(source, one, calibration), log) == 0, log.read_text()
    assert run_ranks(observe_arguments(source, two, calibration), log, 2) == [0, 0], printed(log, 2)
    assert_same_scores(two, one)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_resumed_job_that_was_published_is_tidied_up(tiny, calibration, tmp_path):
    source, log, output = tiny("glm4_moe"), tmp_path / "log", tmp_path / "out"
    arguments = prune_arguments(source, output, calibration)
    assert run(arguments, log) == 0
    before = contents(output)
    statuses = run_ranks([*arguments, "--overwrite"], log, 2)
    assert statuses == [0, 0], printed(log, 2)
    assert decided(output) == {k: v for k, v in before.items() if k.name not in OF_THE_RUN}
