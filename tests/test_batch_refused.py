"""What a batch refuses before its first job starts."""

from __future__ import annotations

import re

import pytest

from reap_stream.batch import asking, checking_steps, room
from reap_stream.batch.jobs_file import read_jobs
from reap_stream.batch.lines import writing_line
from reap_stream.batch.records import Records
from reap_stream.cli import main
from reap_stream.errors import CalibrationError, UsageError
from tests.batches import DEFAULTS, QUESTION, stay_in_process, write_jobs
from tests.upload_server import accepting, log_in

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
        (JOB + "eval = 3\n", "eval is 3, text to evaluate on"),
        (JOB + "eval = []\n", "text to evaluate on"),
        (JOB + "eval = {samples = 3}\n", "text to evaluate on"),
        (JOB + 'eval = {text = "x", best = 3}\n', "job 1: eval: no key 'best': there are batch-to"),
        (JOB + 'eval = {text = "x", seed = "a"}\n', "eval: seed is 'a', a whole number"),
        (JOB + "report = 3\n", "report is 3, the name of a page"),
        (JOB + "upload = true\n", "upload is True, a text, or false"),
        (JOB + 'revision = "v1"\n', "revision is the branch to upload to, and there is no upload"),
        (JOB + 'evict = true\nprotect = "super"\n', "evict has deleted"),
        (JOB + 'base-model = "a/{keep}"\n', "no {keep} here"),
        (JOB.replace("keep = 4", "keep = [4, 6]\nreport = 'a.html'"), r"report .* put \{keep\}"),
        (JOB + "report = 'o/page.html'\n", "written as a whole, and .*page.html of job 'o' lies"),
        (JOB.replace('"builtin"', '"data.txt:5"').replace('"o"', '"."'), "one lies in the other"),
        (JOB.replace('"builtin"', '["o/held.txt:5"]'), "o is written as a whole, and .*held.txt"),
        (JOB.replace('"m"', '"m\\u0000"'), "a text is expected"),
        (JOB + "sparsity = 0.5\n", "not allowed with argument"),
        (JOB + 'method = "best"\n', "job 'o': argument --method: invalid choice"),
        (JOB + 'device = "a"\npropagate = "x"\n', "argument --propagate: invalid choice"),
    ],
)
def test_files_that_are_none(text, message, path, capsys):
    path.write_text(text, encoding="utf-8")
    for name in ("m", "o"):
        (path.parent / name).mkdir()
    (path.parent / "o" / "held.txt").write_text("text", encoding="utf-8")
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


def test_two_checkpoints_are_not_published_in_one_place(
    defaults, path, tmp_path, monkeypatch, capsys
):
    with accepting() as hub:
        log_in(monkeypatch, hub.url, tmp_path / "cache")
        for key, value in (("upload", "me/tiny-{keep}"), ("report", "page-{keep}.html")):
            jobs = (
                {"output": "a"},
                {"output": "b", "keep": 6},
                {"output": "{method}", "method": "ean"},
            )
            write_jobs(path, {**defaults, key: value}, *jobs)
            assert main(["batch", str(path), "--dry-run"]) == 2
            said = capsys.readouterr().err
            assert re.search(rf"jobs 'a' and 'ean': both have {key} .*-4.*put {{model}}", said)
            write_jobs(path, {**defaults, key: value}, *jobs[:2])
            assert main(["batch", str(path), "--dry-run"]) == 0
        # Branches of one repository are places of their own.
        defaults |= {"upload": "me/tiny"}
        write_jobs(path, defaults, {"output": "a"}, {"output": "b", "revision": "b"})
        assert main(["batch", str(path), "--dry-run"]) == 0


def test_data_sets_are_looked_up_once(defaults, path, monkeypatch, capsys):
    asked = []

    def open_hub_set(spec):
        asked.append(spec.text)
        if "nothing" in spec.text:
            raise CalibrationError(f"{spec.text}: no such data set")

    monkeypatch.setattr(checking_steps, "open_hub_set", open_hub_set)
    defaults |= {"calibration": "org/texts(train):4", "eval": "org/texts(test):4"}
    write_jobs(path, defaults, {"output": "a"}, {"output": "b", "eval": "org/nothing(test)"})
    assert main(["batch", str(path)]) == 2
    assert "job 'b': org/nothing(test): no such data set" in capsys.readouterr().err
    assert sorted(asked) == ["org/nothing(test)", "org/texts(test):4", "org/texts(train):4"]


def test_room_for_all_outputs_is_checked_together(defaults, path, monkeypatch, capsys):
    write_jobs(path, defaults, {"output": "a"}, {"output": "b", "keep": 6})
    jobs = read_jobs(path)
    questions = [{**QUESTION, "line": writing_line(job)} for job in jobs]
    found = asking.ask(questions, path.parent)
    # Both outputs, and what passes while one of them is made.
    needed = [answer["disk_nbytes"] for answer in found]
    needed.append(max(answer["passing_nbytes"] for answer in found))
    assert min(needed) > 0
    monkeypatch.setattr(room, "free_nbytes", lambda _: sum(needed) - 1)
    assert main(["batch", str(path)]) == 2
    assert "jobs a, b: " in capsys.readouterr().err
    assert not (path.parent / "a").exists()
    monkeypatch.setattr(room, "free_nbytes", lambda _: sum(needed))
    assert main(["batch", str(path)]) == 0


def test_two_batches_of_one_file_are_refused(defaults, path, capsys):
    from reap_stream.checkpoint.lock import Lock

    write_jobs(path, defaults, {"output": "a"})
    (path.parent / "jobs.reap-batch").mkdir()
    lock = Lock.acquire(path.parent / "jobs.reap-batch" / "lock")
    assert main(["batch", str(path)]) == 2
    lock.release()
    assert "is working on this batch" in capsys.readouterr().err


def test_a_damaged_record_is_named(defaults, path, capsys):
    write_jobs(path, defaults, {"output": "a"})
    record = Records(path.parent / "jobs.reap-batch").path(read_jobs(path)[0])
    record.parent.mkdir(parents=True)
    for text in ("{", "{}", '{"steps": [], "keeps": [], "other": 1}', '{"keeps": ["x"]}', "[]"):
        record.write_text(text, encoding="utf-8")
        assert main(["batch", str(path)]) == 2
        assert f"{record.name}: is no record of a job" in capsys.readouterr().err
