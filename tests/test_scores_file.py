"""The file of scores: what is written is read again, and what does not fit is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from reap_stream.errors import CalibrationError, OutputError
from reap_stream.scoring.saliency import (
    OPTIONAL_STATISTICS,
    STATISTICS,
    SUMS,
)
from reap_stream.scoring.scores_file import load_scores, save_scores
from tests.whole_scores import EXPERTS, by_label, make_scores


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
