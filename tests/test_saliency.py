from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from reap_stream.errors import CalibrationError, OutputError, UsageError
from reap_stream.scoring.merging import merge_scores
from reap_stream.scoring.saliency import (
    METHODS,
    OPTIONAL_STATISTICS,
    STATISTICS,
    SUMS,
    LayerStats,
    Scores,
    expert_scores,
    unreached,
)
from reap_stream.scoring.scores_file import load_scores, save_scores

EXPERTS = 5


def make_stats(rng, sources, experts=EXPERTS):
    """Whole numbers, so that sums are exact in any order; expert 0 is never reached."""
    stats = LayerStats.zeros(sources, experts)
    for name, array in stats.arrays().items():
        # Half of the rows send an expert fewer tokens than all do.
        array[:] = rng.integers(1, 500, array.shape) + 500 * (not name.startswith("odd."))
        array[:, 0] = 0
    return stats


def without(stats, *names):
    """The statistics as earlier versions took them."""
    return LayerStats.of_arrays({k: v for k, v in stats.arrays().items() if k not in names})


def make_scores(seed, sources=("a.jsonl:4", "builtin"), numbers=(1, 2, 10), **changes):
    rng = np.random.default_rng(seed)
    fields = {
        "layers": {layer: make_stats(rng, len(sources)) for layer in numbers},
        "sources": sources,
        "num_experts": EXPERTS,
        "model_fingerprint": "abc",
        "metadata": {"corpus": "00ff", "seed": str(seed)},
    }
    return Scores(**{**fields, **changes})


def by_label(scores):
    return {
        (layer, label, name): array[row].tolist()
        for layer, stats in scores.layers.items()
        for row, label in enumerate(scores.sources)
        for name, array in stats.arrays().items()
    }


def naive_scores(stats, method):
    out = []
    for expert in range(stats.shape[1]):
        column = {name: getattr(stats, name)[:, expert] for name in STATISTICS}
        tokens = sum(column["tokens"].tolist())
        total = {
            "reap": sum(column["gate_norm_sum"].tolist()),
            "ean": sum(column["norm_sum"].tolist()),
            "gate": sum(column["gate_sum"].tolist()),
        }
        if method == "frequency":
            out.append(tokens)
        else:
            out.append(total[method] / tokens if tokens else 0.0)
    return out


@pytest.mark.parametrize("method", [method for method in METHODS if method != "random"])
def test_expert_scores_are_the_formula(method):
    stats = make_stats(np.random.default_rng(3), 3)
    scores = expert_scores(stats, method, seed=0, layer=1)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, naive_scores(stats, method), rtol=1e-15)
    assert scores[0] == 0


def test_expert_scores_leave_the_sums_alone():
    stats = make_stats(np.random.default_rng(3), 1)
    copy = {name: getattr(stats, name).copy() for name in STATISTICS}
    for method in METHODS:
        expert_scores(stats, method, seed=0, layer=1)
    for name, array in copy.items():
        np.testing.assert_array_equal(getattr(stats, name), array)


def test_random_scores_depend_on_seed_and_layer_alone():
    first, second = (make_stats(np.random.default_rng(n), 1) for n in (1, 2))
    one = expert_scores(first, "random", seed=7, layer=3)
    expert_scores(first, "random", seed=7, layer=4)
    np.testing.assert_array_equal(one, expert_scores(second, "random", seed=7, layer=3))
    assert not np.array_equal(one, expert_scores(first, "random", seed=7, layer=4))
    assert not np.array_equal(one, expert_scores(first, "random", seed=8, layer=3))


def test_unknown_method():
    with pytest.raises(UsageError, match=r"'reaper'.*reap, ean"):
        expert_scores(LayerStats.zeros(1, 2), "reaper", seed=0, layer=0)


def test_unreached_counts_all_sources():
    stats = LayerStats.zeros(2, 4)
    stats.tokens[0, 1] = 1
    stats.tokens[1, 3] = 1
    assert unreached(stats) == [0, 2]


def test_add_takes_the_larger_maximum():
    rng = np.random.default_rng(0)
    left, right = make_stats(rng, 2), make_stats(rng, 2)
    want = {
        name: [array.tolist(), right.arrays()[name].tolist()]
        for name, array in left.arrays().items()
    }
    assert want.keys() == {*STATISTICS, *OPTIONAL_STATISTICS}
    left.add(right)
    for name, pair in want.items():
        combine = max if name.endswith("_max") else lambda a, b: a + b
        expected = [
            [combine(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(*pair, strict=True)
        ]
        assert left.arrays()[name].tolist() == expected
    with pytest.raises(CalibrationError, match=r"\[1, 5\] cannot be added to \[2, 5\]"):
        left.add(make_stats(rng, 1))


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, unique=True), min_size=3, max_size=3))
def test_merge_is_associative_and_commutative(labels):
    a, b, c = (
        make_scores(seed, sources=tuple(own), numbers=(0, 4)) for seed, own in enumerate(labels)
    )
    whole = merge_scores([a, b, c])
    assert whole.sources == tuple(dict.fromkeys(labels[0] + labels[1] + labels[2]))
    assert by_label(merge_scores([merge_scores([a, b]), c])) == by_label(whole)
    assert by_label(merge_scores([a, merge_scores([b, c])])) == by_label(whole)
    assert by_label(merge_scores([c, b, a])) == by_label(whole)
    # Against the definition: each label's rows of all runs, summed.
    for (layer, label, name), row in by_label(whole).items():
        rows = [by_label(run)[layer, label, name] for run in (a, b, c) if label in run.sources]
        combine = max if name.endswith("_max") else sum
        assert row == [combine(column) for column in zip(*rows, strict=True)]


@given(st.permutations([(), ("output_max",), tuple(n for n in OPTIONAL_STATISTICS)]))
def test_merge_keeps_later_statistics_where_all_have_them(lacking):
    runs = [make_scores(seed, sources=("a",), numbers=(3,)) for seed in range(3)]
    for run, names in zip(runs, lacking, strict=True):
        run.layers[3] = without(run.layers[3], *names)
    pair, every = merge_scores(runs[:2]).layers[3], merge_scores(runs).layers[3]
    gone = {name for names in lacking[:2] for name in names}
    assert pair.arrays().keys() == {*STATISTICS, *OPTIONAL_STATISTICS} - gone
    assert every.arrays().keys() == {*STATISTICS}
    assert (pair.odd is None, pair.output_max is None) == ("odd.tokens" in gone, bool(gone))
    assert pair.tokens.tolist() == sum(run.layers[3].tokens for run in runs[:2]).tolist()


def test_the_halves_add_up():
    stats = make_stats(np.random.default_rng(3), 2)
    even, odd = stats.halves()
    for name in SUMS:
        np.testing.assert_array_equal(
            getattr(even, name) + getattr(odd, name), getattr(stats, name)
        )
    assert without(stats, *OPTIONAL_STATISTICS).halves() is None


def test_merge_keeps_what_metadata_agree_on_and_inputs_whole():
    a, b = make_scores(0), make_scores(1)
    before = by_label(a)
    merged = merge_scores([a, b])
    assert merged.metadata == {"corpus": "00ff"}
    assert by_label(a) == before


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"model_fingerprint": "xyz"}, "model is xyz, not abc"),
        ({"layers": {1: LayerStats.zeros(2, EXPERTS)}}, r"MoE layers is \[1\], not \[1, 2, 10\]"),
        (
            {"layers": {n: LayerStats.zeros(2, 6) for n in (1, 2, 10)}, "num_experts": 6},
            "number of experts is 6, not 5",
        ),
        ({"sources": ("a", "a")}, "no source twice"),
        ({"metadata": {"propagate": "pruned"}}, "propagation is pruned, not None"),
    ],
)
def test_merge_refuses_what_does_not_belong_together(other, match):
    with pytest.raises(CalibrationError, match=match):
        merge_scores([make_scores(0), make_scores(1, **other)])
    with pytest.raises(CalibrationError, match="no scores"):
        merge_scores([])


def test_merge_refuses_the_same_rows_twice():
    runs = [make_scores(n, metadata={"calibration_sha256": text}) for n, text in enumerate("aba")]
    assert merge_scores(runs[:2]).metadata == {}
    with pytest.raises(CalibrationError, match=r"scores 3 were taken on the same .* as scores 1"):
        merge_scores(runs)


@given(
    st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=4, unique=True),
    st.sets(st.integers(0, 200), min_size=1, max_size=4),
)
def test_save_and_load_give_the_same(tmp_path_factory, sources, layers):
    scores = make_scores(5, sources=tuple(sources), numbers=sorted(layers))
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    save_scores(path, scores)
    loaded = load_scores(path)
    assert by_label(loaded) == by_label(scores)
    assert list(loaded.layers) == sorted(layers)
    assert loaded.sources == tuple(sources)
    assert loaded.num_experts == EXPERTS
    assert loaded.model_fingerprint == "abc"
    assert loaded.metadata == scores.metadata


def test_safetensors_library_reads_the_file(tmp_path):
    scores = make_scores(1)
    save_scores(tmp_path / "s.safetensors", scores)
    with safe_open(tmp_path / "s.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["sources"]) == ["a.jsonl:4", "builtin"]
        assert file.metadata()["format_version"] == "1"
        assert file.metadata()["model_fingerprint"] == "abc"
        every = {**STATISTICS, **OPTIONAL_STATISTICS}
        assert set(file.keys()) == {f"layers.{n}.{s}" for n in (1, 2, 10) for s in every}
        for layer, stats in scores.layers.items():
            for name, dtype in every.items():
                tensor = file.get_tensor(f"layers.{layer}.{name}")
                assert tensor.dtype == dtype
                np.testing.assert_array_equal(tensor, stats.arrays()[name])


def library_file(path, *, drop=(), metadata=None, **tensors):
    """A scores file written by the safetensors library, with faults put in."""
    arrays = {f"layers.0.{name}": np.ones((1, 3), dtype) for name, dtype in STATISTICS.items()}
    arrays.update({name.replace("__", "."): array for name, array in tensors.items()})
    meta = {"format_version": "1", "model_fingerprint": "abc", "sources": '["a"]'}
    meta.update(metadata or {})
    save_file({k: v for k, v in arrays.items() if k not in drop}, path, meta)


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    library_file(tmp_path / "s")
    stats = load_scores(tmp_path / "s").layers[0]
    assert stats.shape == (1, 3)
    assert stats.output_max is None
    assert stats.odd is None
    save_scores(tmp_path / "again", load_scores(tmp_path / "s"))
    assert load_scores(tmp_path / "again").layers[0].arrays().keys() == {*STATISTICS}


ODD = {f"layers__0__odd__{name}": np.ones((1, 3), dtype) for name, dtype in SUMS.items()}


@pytest.mark.parametrize(
    ("faults", "match"),
    [
        ({"metadata": {"format_version": "2"}}, "format version '2', this version reads '1'"),
        ({"metadata": {"sources": "["}}, "no JSON"),
        ({"metadata": {"sources": "[" * 100_000}}, "no JSON"),
        ({"metadata": {"sources": '{"a": 1}'}}, "list of strings"),
        ({"metadata": {"sources": '["a", "b"]'}}, r"\[1, 3\], not \[2, 3\]"),
        ({"metadata": {"sources": "[]"}}, "one of each at least"),
        ({"drop": ("layers.0.norm_max",)}, r"layers\.0\.norm_max is missing"),
        ({"layers__0__extra": np.ones((1, 3))}, r"'layers\.0\.extra'"),
        ({"layers__01__tokens": np.ones((1, 3))}, r"'layers\.01\.tokens'"),
        ({"router": np.ones((1, 3))}, "'router'"),
        ({"layers__0__tokens": np.ones((1, 3), np.int32)}, "I32"),
        ({"layers__0__gate_sum": np.ones((1, 3), np.float32)}, "F32"),
        ({"layers__0__gate_sum": np.ones(3)}, r"F64 \[3\]"),
        ({"layers__0__gate_sum": np.ones((1, 4))}, r"\[1, 4\]"),
        ({"layers__0__tokens": np.full((1, 3), -1)}, "expert 0 is -1"),
        ({"layers__0__norm_sum": np.array([[1, np.nan, 1]])}, "norm_sum.*expert 1 is nan"),
        ({"layers__0__gate_norm_sum": np.array([[1, 1, np.inf]])}, "expert 2 is inf"),
        ({"layers__0__norm_max": np.array([[-1.0, 1, 1]])}, "norm_max"),
        ({"layers__0__tokens": np.array([[0, 1, 1]])}, "expert 0 is 1"),
        ({"layers__0__output_max": np.array([[1, -1.0, 1]])}, "output_max.*expert 1 is -1"),
        ({"layers__0__output_max": np.ones((1, 3), np.int64)}, "I64"),
        ({"layers__0__odd__gate_sum": np.ones((1, 3))}, r"layers\.0\.odd\.tokens is missing"),
        ({**ODD, "layers__0__odd__norm_max": np.ones((1, 3))}, r"'layers\.0\.odd\.norm_max'"),
        ({**ODD, "layers__0__odd__odd__tokens": np.ones((1, 3))}, r"odd\.odd"),
        ({**ODD, "layers__0__odd__tokens": np.array([[1, 2, 1]])}, "odd.tokens.*expert 1 is 2"),
        ({**ODD, "layers__0__odd__norm_sum": np.array([[1, 1, np.inf]])}, "expert 2 is inf"),
        ({**ODD, "layers__0__odd__tokens": np.array([[1, 0, 1]])}, "odd.gate_sum.*expert 1 is 1"),
    ],
)
def test_load_refuses(tmp_path, faults, match):
    library_file(tmp_path / "s", **faults)
    with pytest.raises(CalibrationError, match=match):
        load_scores(tmp_path / "s")


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      "])
def test_load_refuses_other_files(tmp_path, content):
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(CalibrationError):
        load_scores(tmp_path / "s")
    with pytest.raises(CalibrationError, match="not a scores file"):
        load_scores(tmp_path / "absent")


def test_save_refuses_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "s.safetensors"
    save_scores(path, make_scores(1))
    old = path.read_bytes()
    with pytest.raises(CalibrationError, match="'sources' belongs to the format"):
        save_scores(path, make_scores(1, metadata={"sources": "x"}))
    bad = make_scores(1)
    bad.layers[2].gate_sum[1, 3] = np.nan
    with pytest.raises(CalibrationError, match="layer 2: gate_sum of source 1, expert 3 is nan"):
        save_scores(path, bad)
    assert path.read_bytes() == old
    with pytest.raises(OutputError):
        save_scores(tmp_path / "absent" / "s", make_scores(1))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_scoring_needs_no_torch():
    code = (
        "import sys, reap_stream.scoring.scores_file, reap_stream.scoring.selection;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
