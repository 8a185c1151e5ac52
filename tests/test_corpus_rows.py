"""Which rows of calibration data are used, their digest, and what is refused."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from reap_stream.calibration.encoding import TextEncoder
from reap_stream.errors import CalibrationError, UsageError
from tests.corpora import (
    TOKENIZER,
    VOCAB,
    ids_of,
    load,
    make_tokenizer,
    tokens_of,
    write_jsonl,
)


def test_drawing_is_deterministic_ordered_and_uniform(tmp_path):
    np.save(tmp_path / "a.npy", np.stack([np.arange(20)] * 3, axis=1))
    spec = f"{tmp_path / 'a.npy'}:5"
    counts = Counter()
    draws = set()
    for seed in range(400):
        rows = [row[0] for row in tokens_of(load(spec, tokenizer=None, seed=seed))]
        assert rows == sorted(rows)
        assert len(set(rows)) == 5
        counts.update(rows)
        draws.add(tuple(rows))
    assert len(draws) > 380
    # 400 draws of 5 from 20: each row 100 times on average, standard deviation 8.7.
    assert all(55 < counts[row] < 145 for row in range(20))
    again = load(spec, tokenizer=None, seed=3)
    assert again.sha256 == load(spec, tokenizer=None, seed=3).sha256
    assert again.sha256 != load(spec, tokenizer=None, seed=4).sha256


def test_rows_too_short_take_no_place_from_others(tmp_path):
    tokenizer = make_tokenizer(bos=False)
    texts = [letter * (1 if letter in "bdfhjl" else 3) for letter in "abcdefghijkl"]
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    for seed in range(20):
        corpus = load(f"{path}:6", tokenizer=tokenizer, seed=seed)
        assert tokens_of(corpus) == [ids_of(letter * 3) for letter in "acegik"]


def test_samples_limit_the_specs_without_a_count(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((9, 4), np.int64))
    np.save(tmp_path / "b.npy", np.full((9, 4), 2))
    specs = (f"{tmp_path / 'a.npy'}:2", tmp_path / "b.npy")
    corpus = load(*specs, tokenizer=None, samples=4)
    assert [row.source for row in corpus.rows] == [0, 0, 1, 1, 1, 1]
    assert tokens_of(corpus) == [[1] * 4] * 2 + [[2] * 4] * 4
    assert corpus.sources == tuple(str(spec) for spec in specs)
    assert corpus.num_tokens == 24


def test_digest_is_of_ids_and_row_boundaries(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1, 2, 3, 4]]))
    np.save(tmp_path / "b.npy", np.array([[1, 2], [3, 4]]))
    digests = [load(tmp_path / name, tokenizer=None).sha256 for name in ("a.npy", "b.npy")]
    data = [(4).to_bytes(8, "little") + np.array([1, 2, 3, 4], "<i8").tobytes()]
    assert digests[0] == hashlib.sha256(data[0]).hexdigest()
    assert digests[0] != digests[1]


def test_each_source_has_an_origin_of_its_own(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1, 2, 3, 4]]))
    np.save(tmp_path / "b.npy", np.array([[1, 2], [3, 4]]))
    specs = [str(tmp_path / "a.npy"), f"{tmp_path / 'b.npy'}:1"]
    corpus = load(*specs, tokenizer=None)
    alone = [load(spec, tokenizer=None) for spec in specs]
    assert [origin.sha256 for origin in corpus.origins] == [one.sha256 for one in alone]
    assert [origin.record() for origin in corpus.origins] == [
        {
            "source": spec,
            "kind": "file",
            "name": spec.removesuffix(":1"),
            "seen": seen,
            "rows": 1,
            "tokens": one.num_tokens,
            "sha256": one.sha256,
        }
        for spec, one, seen in zip(specs, alone, (1, 2), strict=True)
    ]


@pytest.mark.parametrize(
    ("specs", "settings", "error", "match"),
    [
        ((), {}, UsageError, "no calibration data"),
        (("builtin:2", "builtin:2"), {}, UsageError, "'builtin:2' is given twice"),
        (("builtin",), {"sequence_length": 1}, UsageError, "at least 2 tokens"),
        (("builtin",), {"samples": 0}, UsageError, "cannot take 0 samples"),
        (("builtin",), {"seed": -1}, UsageError, "seed -1"),
        (("builtin",), {"tokenizer": None}, CalibrationError, "no tokenizer: give a .npy"),
        (("absent.jsonl",), {}, CalibrationError, "absent.jsonl: there is no such"),
        (("builtin:2", "org/name(train)"), {"samples": None}, UsageError, "give :N rows"),
    ],
)
def test_refused_before_anything_is_read(specs, settings, error, match):
    with pytest.raises(error, match=match):
        load(*specs, **settings)


def test_other_kinds_of_file_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text\nhello\n")
    with pytest.raises(UsageError, match=r"a\.csv: calibration files end in \.jsonl, \.npy"):
        load(tmp_path / "a.csv")


def test_tokenizer_of_another_model(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "zz"})
    with pytest.raises(CalibrationError, match="ids 0 to 257, the model has 257"):
        load(path, vocab_size=257)


def test_encoder_agrees_with_the_tokenizer_on_whole_documents():
    encoder = TextEncoder(TOKENIZER, VOCAB)
    want = TOKENIZER("two words\n")["input_ids"]
    assert encoder.encode("two words\n", "here").tolist() == want
    assert (
        np.concatenate(list(encoder.encode_document(["two ", "words\n"], "here"))).tolist() == want
    )


def test_calibration_data_need_no_torch():
    code = (
        "import sys, reap_stream.calibration.corpus;"
        "assert not {'torch', 'transformers', 'pyarrow', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
