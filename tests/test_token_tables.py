"""Tables of tokens and their experts, rewritten for the experts that stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reap_stream.checkpoint.refs import TensorRef
from reap_stream.checkpoint.token_tables import TokenTable, remapped
from reap_stream.errors import CheckpointError, UnsupportedError
from reap_stream.model.hash_routing import token_tables
from reap_stream.model.opened import open_model
from reap_stream.verifying import verify_directory
from tests.builders import load_tensors, read_config, write_checkpoint
from tests.engine import prepare, prune_to, read_kept
from tests.oracle_pruning import rehashed


@st.composite
def tables(draw):
    """A table, the experts that stay, and the number of all."""
    num_experts = draw(st.integers(2, 12))
    columns = draw(st.integers(1, min(4, num_experts)))
    row = st.permutations(range(num_experts)).map(lambda numbers: numbers[:columns])
    rows = draw(st.lists(row, min_size=1, max_size=20))
    kept = draw(st.sets(st.integers(0, num_experts - 1), min_size=columns))
    return np.array(rows, dtype=np.int64), sorted(kept), num_experts


def table_ref(table, dtype="I64"):
    return TensorRef("gate.tid2eid", Path("a.safetensors"), dtype, table.shape, 0, table.nbytes)


@given(tables())
def test_each_entry_by_the_rule(drawn):
    table, kept, num_experts = drawn
    made = remapped(table, kept, num_experts)
    np.testing.assert_array_equal(made, rehashed(torch.from_numpy(table), kept).numpy())
    for before, after in zip(table, made, strict=True):
        assert len(set(after)) == len(after)
        assert all(0 <= number < len(kept) for number in after)
        stayed = [column for column, expert in enumerate(before) if expert in kept]
        assert [kept[after[column]] for column in stayed] == [before[c] for c in stayed]


def test_what_is_removed_spreads_evenly():
    table = np.tile(np.arange(8), (800, 1))[:, :2]
    counts = np.bincount(remapped(table, [2, 3, 4, 5], 8).reshape(-1), minlength=4)
    assert counts.max() - counts.min() <= 2


def test_the_example_of_the_documentation():
    table = np.array([[0, 1]] * 7 + [[2, 3]])
    assert remapped(table, [1, 2, 4, 5], 6)[7].tolist() == [1, 0]


@pytest.mark.parametrize(("dtype", "tag"), [(np.int64, "I64"), (np.int32, "I32"), (np.uint8, "U8")])
def test_the_recipe_gives_the_table_in_parts(dtype, tag, monkeypatch):
    monkeypatch.setattr("reap_stream.checkpoint.token_tables._STEP_ROWS", 7)
    rng = np.random.default_rng(0)
    table = np.argsort(rng.random((30, 6)), axis=1)[:, :3].astype(dtype)
    recipe = TokenTable(table_ref(table, tag), 6)
    assert recipe.results(4) == [("gate.tid2eid", tag, (30, 3))]
    raw, made = table.reshape(-1).view(np.uint8), np.zeros(table.nbytes, np.uint8)
    for step in recipe.steps([0, 2, 3, 5]):
        spans = [raw[offset : offset + nbytes] for _, offset, nbytes in step.spans]
        for _, offset, data in step.compute(spans):
            made[offset : offset + data.nbytes] = data
    expected = rehashed(torch.from_numpy(table.astype(np.int64)), [0, 2, 3, 5]).numpy()
    np.testing.assert_array_equal(made.view(dtype).reshape(table.shape), expected)


@pytest.mark.parametrize("wrong", [8, -1])
def test_an_expert_that_is_not_there(wrong):
    table = np.array([[0, 1], [2, wrong]])
    (step,) = TokenTable(table_ref(table), 8).steps([0, 1, 2])
    with pytest.raises(CheckpointError, match=rf"gate\.tid2eid.*expert {wrong}\b.*8"):
        step.compute([table.reshape(-1).view(np.uint8)])


def test_numbers_are_whole():
    with pytest.raises(UnsupportedError, match=r"gate\.tid2eid.*F32"):
        TokenTable(table_ref(np.zeros((2, 2)), "F32"), 4)


def test_they_are_found_by_their_form(tiny):
    v4 = open_model(tiny("deepseek_v4")).architecture
    names = [f"model.layers.{layer}.mlp.gate.tid2eid" for layer in (0, 1)]
    assert token_tables(v4) == {names[0]: 0, names[1]: 1}
    assert token_tables(open_model(tiny("glm4_moe")).architecture) == {}


def test_whole_numbers_of_another_form_are_refused(tiny):
    architecture = open_model(tiny("deepseek_v4")).architecture
    gate = architecture.model.model.layers[0].mlp.gate
    gate.tid2eid = torch.zeros((5, 3), dtype=torch.int64, device="meta")
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.gate\.tid2eid \[5, 3\]"):
        token_tables(architecture)


def test_a_damaged_table_does_not_verify(tiny, calibration, tmp_path):
    output = prune_to(tmp_path / "pruned", tiny("deepseek_v4"), calibration)
    verify_directory(output, tiny("deepseek_v4"))
    tensors = load_tensors(output)
    (name,) = [name for name in tensors if name.endswith("1.ffn.gate.tid2eid")]
    tensors[name][5] = tensors[name][5].flip(0)
    shard = write_checkpoint(tmp_path / "damaged", tensors, read_config(output))
    (output / "model-00001-of-00001.safetensors").write_bytes(
        (shard / "model.safetensors").read_bytes()
    )
    with pytest.raises(Exception, match="tid2eid"):
        verify_directory(output, tiny("deepseek_v4"))


def test_later_layers_see_the_rewritten_table(tiny, calibration, tmp_path):
    source = tiny("deepseek_v4")
    output = prune_to(tmp_path / "pruned", source, calibration, propagate="pruned")
    tables = {name: t for name, t in load_tensors(output).items() if name.endswith("tid2eid")}
    assert len(tables) == 2
    kept = read_kept(output)
    for name, table in tables.items():
        layer = int(name.split("layers.")[1].split(".")[0])
        assert torch.equal(table, rehashed(load_tensors(source)[name], kept[layer]))
    again = prune_to(tmp_path / "again", source, calibration, propagate="pruned", batch_tokens=24)
    assert read_kept(again) == kept
    assert prepare(source, calibration).handover.token_shape == (2, 32)
