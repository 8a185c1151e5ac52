"""Computed tensors of the output, by the two kinds of recipe that families need."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from reap_stream.checkpoint.layout import plan_layout
from reap_stream.checkpoint.output import OutputWriter
from reap_stream.checkpoint.recipes import Patch, Result, Span, Step
from reap_stream.checkpoint.refs import Role
from reap_stream.errors import OutputError, UnsupportedError, VerificationError
from reap_stream.verification import verify
from tests.pruning_source import (
    assert_same,
    load_shards,
    make_source,
    pruned_arrays,
    write_pruned,
)

KEEP = 3
ROUTER = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
WHOLE = "model.layers.2.self_attn.q_proj.weight"


@dataclass(frozen=True)
class KeptNumbers:
    """A table that speaks of experts by number, remade of the kept ones."""

    ref: object
    lost: int = 0

    @property
    def place(self):
        return self.ref.name

    def results(self, keep):
        return [Result("table", "I64", (keep,))]

    def steps(self, kept):
        def compute(raws):
            rows = raws[0].view(np.float32).reshape(self.ref.shape)
            values = np.array([int(rows[j].sum()) for j in kept], dtype=np.int64)
            yield Patch("table", 0, values.view(np.uint8)[self.lost :])

        return [Step((Span(self.ref, 0, self.ref.nbytes),), compute)]


@dataclass(frozen=True)
class Negated:
    """Two tensors of one, in two steps, whoever is kept."""

    ref: object

    @property
    def place(self):
        return self.ref.name

    def results(self, keep):
        assert keep == KEEP
        return [Result("a", "F16", self.ref.shape), Result("b", "F16", self.ref.shape)]

    def steps(self, kept):
        assert kept == ()
        half = self.ref.nbytes // 2
        for offset in (0, half):

            def compute(raws, offset=offset):
                values = raws[0].view(np.float16)
                yield Patch("a", offset, (-values).view(np.uint8))
                yield Patch("b", offset, (2 * values).view(np.uint8))

            yield Step((Span(self.ref, offset, half),), compute)


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "source")


def with_recipes(source, **options):
    """The source, its router of layer 1 and a dense weight of layer 2 computed."""
    tensors = source.open().tensors
    table, negated = KeptNumbers(tensors[ROUTER], **options), Negated(tensors[WHOLE])
    roles = {
        **source.roles,
        ROUTER: replace(source.roles[ROUTER], recipe=table),
        # A companion that the recipe stands for as well: it goes.
        BIAS: replace(source.roles[BIAS], recipe=table),
        WHOLE: replace(source.roles[WHOLE], recipe=negated),
    }
    return replace(source, roles=roles)


def expected(source, kept):
    arrays = pruned_arrays(source.arrays, source.roles, kept)
    del arrays[BIAS]
    rows = arrays.pop(ROUTER)
    whole = arrays.pop(WHOLE)
    table = np.array([int(row.sum()) for row in rows], dtype=np.int64)
    return {**arrays, "table": table, "a": -whole, "b": 2 * whole}


def test_results_take_the_place_of_their_sources(source, tmp_path):
    computed, kept = with_recipes(source), source.choose(KEEP)
    plan = write_pruned(computed, tmp_path / "pruned", kept)
    assert_same(load_shards(tmp_path / "pruned"), expected(source, kept))
    names = list(plan.tensors)
    assert names.index("b") == names.index("a") + 1
    assert plan.tensors["table"].layer == 1
    assert plan.tensors["a"].layer is None
    report = verify(tmp_path / "pruned", source.directory, computed.facts())
    assert report.nbytes == plan.total_size


@pytest.mark.parametrize("memory", [True, False])
def test_bytes_come_from_memory_where_they_are(source, tmp_path, memory):
    computed, kept = with_recipes(source), source.choose(KEEP)
    tensors = computed.open().tensors
    plan = plan_layout(tensors, computed.roles, computed.num_experts, KEEP)
    writer = OutputWriter(tmp_path / "out", plan, tensors, computed.roles)
    writer.allocate()
    outs = writer.from_origin(WHOLE)
    assert [out.name for out in outs] == ["a", "b"]
    written = writer.write(outs, kept, lambda ref: source.arrays[ref.name] if memory else None)
    nbytes = source.arrays[WHOLE].nbytes
    assert written == (2 * nbytes, 0 if memory else nbytes)
    found = load_shards(tmp_path / "out")
    np.testing.assert_array_equal(found["a"], -source.arrays[WHOLE])


@pytest.mark.parametrize("name", ["table", "a", "b"])
def test_a_changed_byte_is_found(source, tmp_path, name):
    computed, kept = with_recipes(source), source.choose(KEEP)
    plan = write_pruned(computed, tmp_path / "pruned", kept)
    out = plan.tensors[name]
    path = tmp_path / "pruned" / plan.shards[out.shard].filename
    data = bytearray(path.read_bytes())
    data[out.offset + out.nbytes - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        VerificationError, match=rf"'{name}': byte {out.nbytes - 1} .*computed from"
    ):
        verify(tmp_path / "pruned", source.directory, computed.facts())


def test_a_recipe_that_gives_too_little_is_a_defect(source, tmp_path):
    computed = with_recipes(source, lost=8)
    with pytest.raises(OutputError, match=r"'table': 16 bytes were computed, 24 planned"):
        write_pruned(computed, tmp_path / "pruned", source.choose(KEEP))


def test_a_result_may_not_have_the_name_of_another_tensor(source):
    tensors = dict(source.open().tensors)
    tensors["a"] = replace(tensors[BIAS], name="a")
    roles = {**source.roles, WHOLE: Role(recipe=Negated(tensors[WHOLE]))}
    with pytest.raises(UnsupportedError, match="'a' would be made of both"):
        plan_layout(tensors, roles, source.num_experts, KEEP)
