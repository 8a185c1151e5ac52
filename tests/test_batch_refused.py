"""What a batch refuses before its first job starts, and how keys become options."""

from __future__ import annotations

import argparse
import re

import pytest

from reap_stream.batch import command
from reap_stream.batch.jobs_file import read_jobs
from reap_stream.batch.keys import KEYS, OWN, PASS, WRITING
from reap_stream.batch.lines import sharing_key, upload_line, verify_line, writing_line
from reap_stream.cli import build_parser, main
from reap_stream.errors import UsageError
from tests.batches import DEFAULTS, stay_in_process, write_jobs

JOB = '[[job]]\nmodel = "m"\noutput = "o"\ncalibration = "builtin"\nkeep = 4\n'


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    stay_in_process(monkeypatch)


@pytest.fixture
def defaults(tiny, calibration):
    return {**DEFAULTS, "model": str(tiny("glm4_moe")), "calibration": list(calibration)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "jobs.toml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"there is no \[\[job\]\]"),
        ("[defaults]\nkeep = 4\n", r"there is no \[\[job\]\]"),
        ("job = 3", r"\[\[job\]\] for each job are expected"),
        ("job = [3]", r"\[\[job\]\] for each job are expected"),
        ("defaults = 3\n" + JOB, r"\[defaults\] once"),
        ("[[job]\n", "jobs.toml: .*line 1"),
        ("keep = 4\nkeep = 4\n", "jobs.toml: .*line 2"),
        ("[jobs]\n" + JOB, "no table 'jobs'"),
        (JOB + 'quality = "best"\n', "job 1: no key 'quality': there are "),
        (JOB + "sequence_length = 4\n", "no key 'sequence_length'; did you mean sequence-length?"),
        (JOB + "samples = true\n", "samples is True, a whole number is expected"),
        (JOB + "samples = 1.5\n", "samples is 1.5, a whole number is expected"),
        (JOB + "seed = '1'\n", "seed is '1', a whole number is expected"),
        (JOB + "pack = 1\n", "pack is 1, true or false is expected"),
        (JOB + "memory = 1.5\n", "memory is 1.5, a size such as"),
        (JOB + "map = [1]\n", r"map is \[1\], a text or a list of texts"),
        (JOB + "map = []\n", "map is"),
        (JOB + "name = ''\n", "name is '', a text is expected"),
        (JOB + "method = 3\n", "method is 3, a text is expected"),
        (JOB + "method = [3]\n", "method is 3, a text is expected"),
        (JOB + "source-weights = {a = 'b'}\n", "source-weights is .*a table of numbers"),
        (JOB.replace("keep = 4", "keep = [4, true]"), r"keep is \[4, True\], a number"),
        (JOB.replace("keep = 4", "sparsity = []"), "sparsity is"),
        (JOB.replace("keep = 4", ""), "sparsity or keep is missing"),
        (JOB.replace('model = "m"', ""), "model is missing"),
        (JOB.replace('output = "o"', ""), "output is missing"),
        (JOB.replace('calibration = "builtin"', ""), "calibration is missing"),
        (JOB.replace('"m"', '"--help"'), "looks like an option"),
        (JOB.replace('"o"', '"o-{keep}"'), r"no \{keep\} here, there are \{model\}, \{method\}"),
        (JOB + JOB, "two jobs are called 'o'"),
        (JOB + JOB.replace('"o"', '"p/../o"') + 'name = "x"\n', "one, or one lies in the other"),
        (JOB + JOB.replace('"o"', '"o/inner"'), "one, or one lies in the other"),
        (JOB.replace('"o"', '"m/inner"'), "the model .* are one, or one lies in the other"),
        (JOB.replace('"o"', '"jobs.reap-batch/o"'), "where logs go"),
        (JOB.replace("keep = 4", 'keep = "4,6"\nupload = "me/it"'), r"put \{keep\} into it"),
        (JOB + "sparsity = 0.5\n", "not allowed with argument"),
        (JOB + 'method = "best"\n', "job 'o': argument --method: invalid choice"),
        (JOB + 'device = "a"\npropagate = "x"\n', "argument --propagate: invalid choice"),
    ],
)
def test_files_that_are_none(text, message, path, capsys):
    path.write_text(text, encoding="utf-8")
    (path.parent / "m").mkdir()
    assert main(["batch", str(path)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (path.parent / "jobs.reap-batch").exists()


@pytest.mark.parametrize("raw", [b"a = '\xff'", b"\x00", None])
def test_files_that_cannot_be_read(raw, path):
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(UsageError, match=r"jobs\.toml"):
        read_jobs(path)


def test_all_jobs_are_checked_before_the_first_starts(defaults, path, capsys):
    (path.parent / "there").mkdir()
    (path.parent / "there" / "file").write_text("mine", encoding="utf-8")
    (path.parent / "data.csv").write_text("a,b", encoding="utf-8")
    write_jobs(
        path,
        defaults,
        {"output": "good"},
        {"output": "b", "keep": 99},
        {"output": "c", "model": "nowhere"},
        {"output": "d", "calibration": "missing.jsonl"},
        {"output": "e", "calibration": "data.csv"},
        {"output": "there"},
        {"output": "g", "memory": "1MB"},
        {"output": "h", "keep": [4, 6], "propagate": "pruned"},
        {"output": "i", "evict": True},
        {"output": "j", "source-weights": {"nobody": 2}},
    )
    assert main(["batch", str(path)]) == 2
    said = capsys.readouterr().err
    assert "no job was started" in said
    expected = {
        "b": "cannot keep 99 of 8",
        "c": "nowhere",
        "d": "there is no file missing.jsonl",
        "e": "no .jsonl, .npy, .parquet, .txt file",
        "there": "exists already",
        "g": "give more",
        "h": "needs a job for each target",
        "i": "is no model on the Hub",
        "j": "no calibration source 'nobody'",
    }
    for name, message in expected.items():
        line = next(line for line in said.splitlines() if f"job {name!r}:" in line)
        assert message in line
    assert "job 'good'" not in said
    assert not (path.parent / "good").exists()
    assert not (path.parent / "jobs.reap-batch").exists()


def test_room_for_all_outputs_is_checked_together(defaults, path, monkeypatch, capsys):
    write_jobs(path, defaults, {"output": "a"}, {"output": "b", "keep": 6})
    found = command._checked(read_jobs(path), {"a": "new", "b": "new"})
    needed = [answer["disk_nbytes"] for answer in found]
    monkeypatch.setattr(command, "free_nbytes", lambda _: sum(needed) - 1)
    assert main(["batch", str(path)]) == 2
    assert "jobs a, b: " in capsys.readouterr().err
    assert not (path.parent / "a").exists()
    monkeypatch.setattr(command, "free_nbytes", lambda _: sum(needed))
    assert main(["batch", str(path)]) == 0


def test_two_batches_of_one_file_are_refused(defaults, path, capsys):
    from reap_stream.checkpoint.lock import Lock

    write_jobs(path, defaults, {"output": "a"})
    (path.parent / "jobs.reap-batch").mkdir()
    lock = Lock.acquire(path.parent / "jobs.reap-batch" / "lock")
    assert main(["batch", str(path)]) == 2
    lock.release()
    assert "is working on this" in capsys.readouterr().err


def test_a_damaged_record_is_named(defaults, path, capsys):
    write_jobs(path, defaults, {"output": "a"})
    records = path.parent / "jobs.reap-batch"
    records.mkdir()
    for text in ("{", "{}", '{"steps": [], "other": 1}', "[]"):
        (records / "a.json").write_text(text, encoding="utf-8")
        assert main(["batch", str(path)]) == 2
        assert "a.json: is no record of a job" in capsys.readouterr().err


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
    assert options_of("prune") - {"resume"} == (KEYS.keys() - OWN.keys()) | {"output", "overwrite"}
    # What is not of the pass can be said to compact as well.
    assert options_of("compact") == WRITING.keys() | {"scores", "output", "overwrite", "resume"}
    assert not PASS.keys() & WRITING.keys()


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
    for own in (verify_line(job, job.output), upload_line(job, job.output / "keep-96")):
        build_parser().parse_args(own)
    assert upload_line(job, job.output / "keep-96")[2] == "me/Big-MoE-96"
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
        ({"evict": True}, False),
    ],
)
def test_jobs_share_a_reading_where_their_scores_are_the_same(change, shared, defaults, path):
    write_jobs(path, defaults, {"output": "a"}, {"output": "b", **change})
    one, other = map(sharing_key, read_jobs(path))
    assert (one == other) is shared
