"""How keys of a job become options, and which jobs have a reading in common."""

from __future__ import annotations

import argparse

import pytest

from reap_stream.batch.jobs_file import read_jobs
from reap_stream.batch.keys import EVALUATING, KEYS, OWN, PASS, UPLOADING, WRITING, base_name
from reap_stream.batch.lines import (
    eval_line,
    evaluation_key,
    sharing_key,
    upload_line,
    verify_line,
    writing_line,
)
from reap_stream.cli import build_parser
from tests.batches import DEFAULTS, write_jobs

# A batch resumes by itself, and has no ranks.
NOT_OF_JOBS = {"resume", "rank-patience"}


@pytest.fixture
def defaults(tiny, calibration):
    return {**DEFAULTS, "model": str(tiny("glm4_moe")), "calibration": list(calibration)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "jobs.toml"


def options_of(name):
    (commands,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    found = {
        option for action in commands.choices[name]._actions for option in action.option_strings
    }
    return {option.removeprefix("--") for option in found if option.startswith("--")} - {"help"}


def test_every_option_of_prune_is_a_key():
    assert options_of("prune") - NOT_OF_JOBS == (KEYS.keys() - OWN.keys()) | {"output", "overwrite"}
    # What is not of the pass can be said to compact as well.
    own = {"scores", "scores-of-other-weights", "output", "overwrite", "resume"}
    assert options_of("compact") == WRITING.keys() | own
    assert not PASS.keys() & WRITING.keys()


def test_every_option_of_the_steps_is_a_key():
    # Candidates are the batch's own checkpoints, and it says where results go.
    choosing = {"scores", "sparsity", "keep", "method", "source-weights", "protect"}
    places = {"output", "overwrite", "json", "scratch"}
    # Of the job: code that is trusted for one command is for all.
    assert options_of("eval") - choosing - places - {"trust-remote-code"} == EVALUATING.keys()
    # A batch has a dry run of its own.
    assert options_of("upload") - {"dry-run"} == UPLOADING.keys()
    assert options_of("card") == {"eval", "base-model"}


def test_an_evaluation_is_run_as_the_job_unless_it_says_otherwise(defaults, path):
    defaults |= {"seed": 3, "pack": True, "trust-remote-code": True, "memory": "4GiB"}
    write_jobs(
        path,
        defaults,
        {"output": "a", "eval": ["x.jsonl:3", "y.jsonl"]},
        {"output": "b", "eval": {"text": "x.jsonl", "seed": 4, "pack": False, "device": "cuda"}},
        {"output": "c", "eval": ["x.jsonl:3", "y.jsonl"], "method": "ean"},
        {"output": "d"},
    )
    jobs = read_jobs(path)
    first, second = (
        build_parser().parse_args(eval_line([job], path.with_suffix(".json"))) for job in jobs[:2]
    )
    assert (first.text, first.seed, first.pack) == (["x.jsonl:3", "y.jsonl"], 3, True)
    assert (first.device, first.compute_dtype, first.batch_tokens) == ("cpu", "float32", 72)
    assert (first.memory, first.trust_remote_code) == ("4GiB", True)
    assert (second.text, second.seed, second.pack, second.device) == (["x.jsonl"], 4, False, "cuda")
    keys = [evaluation_key(job) for job in jobs]
    assert keys[0] == keys[2] != keys[1]
    assert keys[3] is None


def test_keys_become_options(path):
    path.write_text(
        """
        [defaults]
        sparsity = 0.25
        seed = 7
        [[job]]
        model = "org/Big-MoE@v1"
        output = "out/{model}"
        calibration = ["a.jsonl:5", "b.txt"]
        keep = [96, "120"]
        pack = true
        evict = false
        source-weights = {"a.jsonl:5" = 2, "b.txt" = 0.5}
        trust-remote-code = true
        upload = "me/{model}-{keep}"
        """,
        encoding="utf-8",
    )
    (job,) = read_jobs(path)
    assert job.name == "out-Big-MoE"
    line = writing_line(job)
    arguments = build_parser().parse_args(line)
    assert arguments.keep == "96,120"
    assert arguments.sparsity is None
    assert arguments.calibration == ["a.jsonl:5", "b.txt"]
    assert arguments.source_weights == "a.jsonl:5=2,b.txt=0.5"
    assert (arguments.seed, arguments.pack, arguments.evict) == (7, True, False)
    assert arguments.output == path.parent / "out" / "Big-MoE"
    for own in (verify_line(job, job.output), upload_line(job, job.output, "me/it")):
        build_parser().parse_args(own)
    build_parser().parse_args(writing_line(job, path, resume=True))


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ({"keep": 6}, True),
        ({"method": "ean"}, True),
        ({"weights": "fp8"}, True),
        ({"protect": "super"}, True),
        ({"seed": 1}, False),
        ({"mtp": "drop"}, False),
        ({"samples": 3}, False),
        ({"calibration": "builtin"}, False),
        ({"model": "other"}, False),
        ({"compute-dtype": "bfloat16"}, False),
        ({"propagate": "pruned"}, False),
        ({"evict": True}, True),
    ],
)
def test_jobs_share_a_reading_where_their_scores_are_the_same(change, shared, defaults, path):
    write_jobs(path, defaults, {"output": "a"}, {"output": "b", **change})
    one, other = map(sharing_key, read_jobs(path))
    assert (one == other) is shared


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/Tiny", "Tiny"),
        ("org/Tiny@v1", "Tiny"),
        ("/data/models@lab/Tiny", "Tiny"),
        ("/data/Tiny@2/", "Tiny@2"),
        ("Tiny", "Tiny"),
    ],
)
def test_a_model_is_called_by_its_last_part(model, name):
    assert base_name(model) == name
