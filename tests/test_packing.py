"""Packs: exactly filled, drawn at random, and of documents that know nothing of each other."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reap_stream.calibration.batches import plan_batches
from reap_stream.calibration.packing import fill
from reap_stream.calibration.sampling import Window
from reap_stream.errors import CalibrationError
from tests.builders import VOCABULARY
from tests.corpora import load, tokens_of, write_jsonl
from tests.engine import prepare, prune_to, stream

LENGTHS = st.lists(st.integers(0, 40), max_size=30)


def documents(lengths):
    """Documents whose tokens are all different, so that each shows where it came from."""
    start = 0
    for length in lengths:
        tokens = np.arange(start, start + length)
        start += length
        yield lambda tokens=tokens: tokens


def owners(lengths):
    return np.repeat(np.arange(len(lengths)), lengths)


@given(LENGTHS, st.integers(1, 12), st.integers(2, 16), st.integers(0, 5))
@example([2, 3], 1, 3, 1)
@example([2, 2, 3], 1, 3, 0)
def test_packs_are_filled_exactly(lengths, packs, length, seed):
    drawn = fill(documents(lengths), (packs, length), seed)
    usable = [n for n in lengths if n > 1]
    if length == 2:
        usable = [n // 2 * 2 for n in usable]
    tokens = np.concatenate([np.empty(0, int), *drawn.rows])
    want = min(packs * length, sum(usable))
    # One token is left over only where no document drawn has a third to give.
    assert want - len(tokens) in ((0, 1) if all(len(row) == 2 for row in drawn.rows) else (0,))
    assert all(2 <= len(row) <= length for row in drawn.rows)
    assert drawn.seen == len(lengths)
    # No token twice, none out of order, and no row with tokens of two documents.
    assert (np.diff(tokens) > 0).all()
    of = owners(lengths)
    assert all(len(set(of[row])) == 1 for row in drawn.rows)


@given(LENGTHS, st.integers(2, 16))
def test_without_a_limit_nothing_is_lost(lengths, length):
    drawn = fill(documents(lengths), (None, length), 0)
    kept = [n for n in lengths if n > 1]
    lost = sum(n % 2 for n in kept) if length == 2 else 0
    assert sum(map(len, drawn.rows)) == sum(kept) - lost
    assert drawn.skipped == len(lengths) - len(kept)
    # As few rows as there can be.
    assert len(drawn.rows) <= sum(-(-n // length) for n in kept)


def test_a_tail_of_one_token_takes_another_along():
    assert [len(row) for row in fill(documents([13]), (None, 4), 0).rows] == [4, 4, 3, 2]


def test_a_single_token_to_fill_is_taken_from_the_longest():
    for seed in range(20):
        rows = fill(documents([3, 3, 3, 3]), (1, 4), seed).rows
        assert [len(row) for row in rows] == [2, 2]


def test_documents_are_drawn_uniformly():
    lengths = [4] * 20
    counts: Counter[int] = Counter()
    for seed in range(400):
        rows = fill(documents(lengths), (2, 10), seed).rows
        counts.update({int(owners(lengths)[row[0]]) for row in rows})
    # 400 draws of 5 from 20: each document 100 times on average, standard deviation 8.7.
    assert all(65 < counts[number] < 135 for number in range(20))


def test_reading_ends_when_enough_was_seen():
    window = Window(per_row=4, least=30)
    # 2 packs of 10 tokens take 5 documents.
    assert fill(documents([4] * 1000), (2, 10), 0, window).seen == 30
    assert fill(documents([4] * 1000), (20, 10), 0, window).seen == 4 * 50
    assert fill(documents([4] * 20), (20, 10), 0, window).seen == 20


def test_numbers_count_packs(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": "x" * (1 + n % 90)} for n in range(300)))
    corpus = load(f"{path}:7", sequence_length=64, pack=True)
    assert corpus.num_tokens == 7 * 64
    assert len(corpus.rows) > 7
    assert load(path, sequence_length=64, samples=5, pack=True).num_tokens == 5 * 64
    assert load(f"{path}:7", sequence_length=64, pack=True).sha256 == corpus.sha256
    assert load(f"{path}:7", sequence_length=64, pack=True, seed=1).sha256 != corpus.sha256
    short = load(f"{path}:500", sequence_length=64, pack=True)
    assert short.notes == (
        f"{path}:500: {short.num_tokens} tokens, 500 packs of 64 were asked for",
    )  # fmt: skip


def test_long_records_go_on_in_the_next_row(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "abcdefghij"})
    whole = tokens_of(load(path))[0]
    assert tokens_of(load(path, sequence_length=5)) == [whole[:5]]
    assert tokens_of(load(path, sequence_length=5, pack=True)) == [
        whole[:5],
        whole[5:10],
        whole[10:],
    ]
    np.save(tmp_path / "a.npy", np.arange(22).reshape(2, 11))
    rows = tokens_of(load(tmp_path / "a.npy", tokenizer=None, sequence_length=5, pack=True))
    assert [len(row) for row in rows] == [5, 4, 2] * 2


def test_of_nothing_no_packs_are_made(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": ""})
    with pytest.raises(CalibrationError, match="no row of at least 2 tokens"):
        load(path, pack=True)


def test_parts_of_a_mix_fill_packs_of_their_own():
    corpus = load("builtin:8", sequence_length=128, pack=True)
    assert corpus.num_tokens == 8 * 128


def test_without_packing_rows_are_what_they_were(tmp_path):
    """The rows as a formula has them: drawn by the smallest random numbers, cut, in file order."""
    texts = ["x" * (n % 90) + str(n) for n in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    keys = np.random.default_rng(3).random(100)
    all_rows = tokens_of(load(path, sequence_length=64))
    want = hashlib.sha256()
    for number in sorted(np.argsort(keys)[:10]):
        want.update(len(all_rows[number]).to_bytes(8, "little"))
        want.update(np.array(all_rows[number], "<i8").tobytes())
    assert load(f"{path}:10", sequence_length=64, seed=3).sha256 == want.hexdigest()


def test_thousands_of_short_rows_waste_little():
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(4, 1, 20_000), 2, 2048).astype(int).tolist()
    batches = plan_batches(lengths, 8192)
    padded = sum(batch.width * len(batch.rows) for batch in batches)
    assert padded < 1.05 * sum(lengths)
    assert len(batches) < 1.1 * sum(lengths) / 8192 + 10


@pytest.mark.parametrize("family_id", ["glm4_moe", "qwen3_next", "mixtral"])
def test_documents_do_not_see_each_other(family_id, tiny, tmp_path):
    random = np.random.default_rng(0)
    shapes = {"a": (5, 11), "b": (6, 7), "c": (3, 23)}
    arrays = {name: random.integers(0, VOCABULARY, shape) for name, shape in shapes.items()}
    specs = [f"{tmp_path / name}.npy:2" for name in arrays]

    def streamed():
        for name, array in arrays.items():
            np.save(tmp_path / name, array)
        ready = prepare(tiny(family_id), specs, sequence_length=16, pack=True)
        return ready.corpus, stream(ready, tmp_path)

    corpus, before = streamed()
    assert [origin.tokens for origin in corpus.origins] == [32, 32, 32]
    arrays["b"] = random.integers(0, VOCABULARY, shapes["b"])
    changed, after = streamed()
    rows = [row.source == 1 for row in corpus.rows]
    assert [len(row.tokens) for row in changed.rows] == [len(row.tokens) for row in corpus.rows]
    for one, other in zip(before.states, after.states, strict=True):
        for number, touched in enumerate(rows):
            # The same numbers but for how many tokens share a product; what leaks is no rounding.
            assert bool((one[number] - other[number]).abs().max() > 1e-3) == touched
            assert touched or (one[number] - other[number]).abs().max() < 1e-5
    for layer, stats in before.stats.items():
        for source in (0, 2):
            np.testing.assert_array_equal(stats.tokens[source], after.stats[layer].tokens[source])
            np.testing.assert_allclose(
                stats.gate_norm_sum[source], after.stats[layer].gate_norm_sum[source], rtol=1e-4
            )


def test_a_job_says_that_it_packed(tiny, calibration, tmp_path):
    options = {"pack": True, "sequence_length": 8, "samples": 1}
    output = prune_to(tmp_path / "out", tiny("glm4_moe"), calibration, **options)
    record = json.loads((output / "reap" / "run.json").read_text())
    assert record["settings"]["pack"] is True
    tokens = [origin["tokens"] for origin in record["calibration"]["origins"]]
    assert tokens == [8] * len(calibration)
    assert record["calibration"]["tokens"] == sum(tokens)
