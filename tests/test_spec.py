from __future__ import annotations

import pytest

from reap_stream.calibration.spec import CalibrationSpec, parse_spec
from reap_stream.errors import UsageError


@pytest.mark.parametrize(
    ("text", "kind", "name", "config", "split", "rows"),
    [
        ("calib.jsonl", "file", "calib.jsonl", None, None, None),
        ("calib.jsonl:512", "file", "calib.jsonl", None, None, 512),
        ("some/dir/a.parquet:7", "file", "some/dir/a.parquet", None, None, 7),
        ("/data/with space.txt", "file", "/data/with space.txt", None, None, None),
        ("odd:3:4.npy:5", "file", "odd:3:4.npy", None, None, 5),
        ("builtin", "builtin", "mixed", None, None, None),
        ("builtin:64", "builtin", "mixed", None, None, 64),
        ("builtin:code", "builtin", "code", None, None, None),
        ("builtin:prose:12", "builtin", "prose", None, None, 12),
        ("builtin:chat", "builtin", "chat", None, None, None),
        ("org/name", "hub", "org/name", None, None, None),
        ("org/name(train):1024", "hub", "org/name", None, "train", 1024),
        ("allenai/c4[en](train):1024", "hub", "allenai/c4", "en", "train", 1024),
        ("gsm8k[main](test)", "hub", "gsm8k", "main", "test", None),
    ],
)
def test_grammar(text, kind, name, config, split, rows):
    assert parse_spec(text) == CalibrationSpec(kind, name, text, rows, config, split)


@pytest.mark.parametrize(
    ("text", "revision", "config", "split", "rows"),
    [
        ("org/name@main", "main", None, None, None),
        ("org/name@refs/pr/3:8", "refs/pr/3", None, None, 8),
        ("org/name@0123abc[en](train):16", "0123abc", "en", "train", 16),
        ("gsm8k@v1.0", "v1.0", None, None, None),
    ],
)
def test_revision(text, revision, config, split, rows):
    spec = parse_spec(text)
    assert (spec.kind, spec.name) == ("hub", text.partition("@")[0])
    assert (spec.revision, spec.config, spec.split, spec.rows) == (revision, config, split, rows)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is no SPEC"),
        (":5", "is no SPEC"),
        ("calib.jsonl:0", "at least 1"),
        ("builtin:0", "at least 1"),
        ("calib.jsonl:-3", "is no SPEC"),
        ("calib.jsonl:ten", "is no SPEC"),
        ("calib", "is no SPEC"),
        ("calib.csv", "such as"),
        ("./data/calib", "no file of that name"),
        ("builtin:", "no built-in text ''"),
        ("builtin:poems:4", "builtin:prose"),
        ("org/name[en", "is no SPEC"),
        ("org/name(train)[en]:4", "is no SPEC"),
        ("org/name/more(train):4", "is no SPEC"),
        ("org/name()", "is no SPEC"),
        ("org/name@", "is no SPEC"),
        ("org/name[en]@main", "is no SPEC"),
        ("nul\0byte", "is no SPEC"),
        ("x" * 5000, "is no SPEC"),
    ],
)
def test_malformed(text, match):
    with pytest.raises(UsageError, match=match):
        parse_spec(text)


@pytest.mark.parametrize("name", ["builtin", "rows.jsonl:12", "no_suffix", "builtin:3"])
def test_path_that_exists_wins(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("{}")
    assert parse_spec(name) == CalibrationSpec("file", name, name)
    assert parse_spec(f"{name}:9") == CalibrationSpec("file", name, f"{name}:9", 9)
    assert parse_spec(name).path.is_file()
