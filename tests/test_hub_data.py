"""Data sets of the Hub: what is read, what is recorded, and what every failure says to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from reap_stream.calibration.hub import open_splits
from reap_stream.calibration.hub_errors import choose
from reap_stream.calibration.spec import parse_spec
from reap_stream.errors import CalibrationError, UsageError
from tests.corpora import TOKENIZER, load, write_jsonl
from tests.data_set_hub import COMMIT, serving

ROOT = Path(__file__).parents[1]
FILES, ROWS = 30, 120
CONFIGS = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train.jsonl}
  - {split: test, path: en/test.jsonl}
- config_name: de
  data_files:
  - {split: train, path: de/train.jsonl}
---
"""


def in_words(result):
    """The rows of a result as text: the tests' tokenizer has one token a byte."""
    letters = TOKENIZER.convert_ids_to_tokens(range(258))
    spelled = ["".join(letters[byte + 1] for byte in bytes.fromhex(row)) for row in result["rows"]]
    return [text.replace("Ġ", " ") for text in spelled]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A root of data sets: in many files, with configurations, gated, and damaged ones."""
    pytest.importorskip("datasets")
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    root = tmp_path_factory.mktemp("hub")
    for number in range(FILES):
        path = root / "org" / "many" / f"part-{number:02}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, *({"text": f"file {number:02} row {row:03}"} for row in range(ROWS)))
    for language in ("en", "de"):
        for split in ("train", "test"):
            path = root / "org" / "two" / language / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(path, *({"text": f"{language} {split} {row}"} for row in range(6)))
    (root / "org" / "two" / "README.md").write_text(CONFIGS)
    for name, record in {"gated-set": {"text": "a"}, "unknown": {"colour": "red"}}.items():
        (root / "org" / name).mkdir()
        write_jsonl(root / "org" / name / "train.jsonl", record)
    (root / "org" / "parquet").mkdir()
    for number in range(2):
        turns = [[{"role": "user", "content": f"{number}{row:02}."}] for row in range(10)]
        table = arrow.table({"messages": turns, "other": [number] * 10})
        parquet.write_table(table, root / "org" / "parquet" / f"train-{number}.parquet")
    (root / "org" / "damaged").mkdir()
    (root / "org" / "damaged" / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (root / "org" / "empty").mkdir()
    (root / "org" / "empty" / "README.md").write_text("nothing here\n")
    return root


ASKED = {
    "many": ("org/many:40", {}),
    "again": ("org/many(train):40", {}),
    "seed": ("org/many:40", {"seed": 1}),
    "packed": ("org/many:3", {"pack": True, "sequence_length": 50}),
    "pinned": (f"org/two@{COMMIT}[en](test):4", {}),
    "all": ("org/two@v1.0[de]:9", {}),
    "parquet": ("org/parquet:30", {}),
    "configs": ("org/two:4", {}),
    "splits": ("org/two[en]:4", {}),
    "no config": ("org/two[fr](train):4", {}),
    "no split": ("org/two[en](tset):4", {}),
    "no revision": ("org/two@v3[en](train):4", {}),
    "misspelt": ("org/mnay:4", {}),
    "other owner": ("orgg/many:4", {}),
    "gated": ("org/gated-set:4", {}),
    "unknown": ("org/unknown:4", {}),
    "damaged": ("org/damaged:4", {}),
    "empty": ("org/empty:4", {}),
}


def ask(endpoint, home, questions):
    """The outcome of every SPEC in a process that knows this Hub alone."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("HF_TOKEN", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.data_set_client", json.dumps(questions)],
        capture_output=True, text=True, check=False, env=environment, cwd=home, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def answers(hub, tmp_path_factory):
    """The outcome of each of `ASKED`, and what the Hub was asked for the first."""
    home = tmp_path_factory.mktemp("home")
    with serving(hub) as server:
        first, *rest = ASKED.values()
        results = ask(server.url, home, [first])
        first_log = list(server.requests)
        results += ask(server.url, home, rest)
    return dict(zip(ASKED, results, strict=True)), first_log


def test_rows_are_drawn_from_a_part_of_the_files(answers, hub):
    results, log = answers
    rows = in_words(results["many"])
    assert len(rows) == len(set(rows)) == 40
    known = {json.loads(line)["text"] for f in hub.glob("org/many/*") for line in f.open()}
    assert set(rows) <= known
    # Of 3,600 records 1,000 are looked at; a file has 120.
    read = {r.path for r in log if r.method == "GET" and "/resolve/" in r.path}
    assert 1000 // ROWS <= len(read) < FILES * 2 // 3
    assert len({row.split()[1] for row in rows}) > 4


def test_everything_is_read_at_the_commit(answers):
    _, log = answers
    files = [request.path for request in log if "/resolve/" in request.path]
    assert files
    assert all(f"/resolve/{COMMIT}/" in path for path in files)


def test_the_draw_is_the_seeds(answers):
    results, _ = answers
    assert results["many"]["sha256"] == results["again"]["sha256"]
    assert results["many"]["sha256"] != results["seed"]["sha256"]


def test_the_origin_says_what_was_read(answers):
    results, _ = answers
    origin = results["many"]["origin"]
    tokens = sum(len(row) // 2 + 2 for row in results["many"]["rows"])
    assert origin.pop("reader").startswith("datasets ")
    assert origin == {
        "source": "org/many:40",
        "kind": "hub",
        "name": "org/many",
        "config": "default",
        "split": "train",
        "revision": COMMIT,
        "seen": 1000,
        "rows": 40,
        "tokens": tokens,
        "sha256": results["many"]["sha256"],
    }


def test_packs_are_filled(answers):
    results, _ = answers
    assert results["packed"]["origin"]["tokens"] == 150


def test_parquet_is_read_too(answers):
    result = answers[0]["parquet"]
    assert result["notes"] == ["org/parquet:30: 20 rows, 30 were asked for"]
    # "<user>107." without its ends, which the client takes for tokens around a document.
    assert sorted(in_words(result)) == [f"user>{n}{row:02}" for n in range(2) for row in range(10)]


def test_configuration_split_and_revision(answers):
    results, _ = answers
    assert {row[:7] for row in in_words(results["pinned"])} == {"en test"}
    assert len(results["pinned"]["rows"]) == 4
    assert sorted(in_words(results["all"])) == [f"de train {row}" for row in range(6)]
    assert results["all"]["notes"] == ["org/two@v1.0[de]:9: 6 rows, 9 were asked for"]


@pytest.mark.parametrize(
    ("key", "kind", "match"),
    [
        ("configs", "UsageError", "must name a configuration of org/two, in the form ID[CONFIG]"),
        ("configs", "UsageError", "it has en, de"),
        ("splits", "UsageError", "it has train, test"),
        ("no config", "CalibrationError", "org/two has no configuration 'fr': it has en, de"),
        ("no split", "CalibrationError", "no split 'tset', did you mean test? it has train, test"),
        ("no revision", "CalibrationError", "org/two has no such revision"),
        ("misspelt", "CalibrationError", "no data set org/mnay. Did you mean org/many? F"),
        ("misspelt", "CalibrationError", "there is no such file"),
        ("misspelt", "CalibrationError", "For a private one: hf auth login"),
        ("other owner", "CalibrationError", "Did you mean org/many? F"),
        ("gated", "CalibrationError", "org/gated-set is gated: accept its conditions on http://"),
        ("gated", "CalibrationError", "/datasets/org/gated-set, then: hf auth login"),
        ("unknown", "CalibrationError", "org/unknown, record 1: fields colour"),
        ("damaged", "CalibrationError", "org/damaged failed at reading record"),
        ("empty", "CalibrationError", "data set org/empty failed at"),
    ],
)
def test_failures_say_what_to_do(answers, key, kind, match):
    result = answers[0][key]
    assert result.get("error") == kind, result
    assert match in result["message"]


def test_no_network(tmp_path):
    pytest.importorskip("datasets")
    (result,) = ask("http://127.0.0.1:9", tmp_path, [("org/many:4", {})])
    assert result["error"] == "CalibrationError"
    assert "looking it up (there is no file of that name)" in result["message"]
    assert "/datasets/org/many be reached? If it can, save the rows" in result["message"]


def test_offline_is_said_to_be_so():
    pytest.importorskip("datasets")
    with pytest.raises(CalibrationError, match="HF_HUB_OFFLINE is set: unset it, or save"):
        load("org/name:4")


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r'no such file.*pip install "reap-stream\[data\]"'):
        load("org/name:4")


def test_a_directory_is_not_taken_for_a_data_set(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="org/name is a directory here: give its files"):
        load("org/name:4")


def test_local_files_need_no_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert load(write_jsonl(tmp_path / "a.jsonl", {"text": "abc"})).num_tokens == 5


def test_fields_that_the_library_fills_in_are_taken_out_again(tmp_path):
    """The first record of a column of structs has every field that any record has."""
    pytest.importorskip("datasets")
    plain = {"messages": [{"role": "user", "content": "a"}], "tools": None}
    called = {"messages": [{"role": "assistant", "content": "b", "name": "n"}], "tools": "[]"}
    write_jsonl(tmp_path / "train.jsonl", plain, called)
    opened = open_splits(parse_spec("org/name:2"), str(tmp_path), "0" * 40)
    records = {str(record["messages"]): record for _, record in opened.records(0)}
    assert records[str(plain["messages"])] == plain


def test_only_as_many_records_are_fetched_as_are_looked_at(tmp_path):
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "train.jsonl", *({"text": str(number)} for number in range(500)))
    opened = open_splits(parse_spec("org/name(train):2"), str(tmp_path), "0" * 40)
    places = [where for where, _ in islice(opened.records(0), 3)]
    assert places == [f"{tmp_path}, record {number}" for number in (1, 2, 3)]
    assert len({record["text"] for _, record in opened.records(0)}) == 500
    again = [[record["text"] for _, record in islice(opened.records(s), 20)] for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_long_lists_are_cut_short():
    spec = parse_spec("org/name:4")
    with pytest.raises(UsageError, match=r"it has c0, .*c11 and 88 more$"):
        choose(spec, "configuration", None, [f"c{number}" for number in range(100)])
    with pytest.raises(CalibrationError, match="did you mean c7"):
        choose(spec, "configuration", "c7x", [f"c{number}" for number in range(100)])
    with pytest.raises(UsageError, match="it has none"):
        choose(spec, "split", None, [])
