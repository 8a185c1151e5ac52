from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from reap_stream.checkpoint.layout import index_json, layer_tensors, plan_layout
from reap_stream.checkpoint.pieces import kept_faults, pieces
from reap_stream.checkpoint.refs import Role, TensorRef
from reap_stream.errors import UnsupportedError, UsageError
from tests.pruning_source import assert_same, pruned_arrays

DTYPES = {"U8": np.uint8, "F16": np.float16, "F32": np.float32, "I64": np.int64}
FILE = Path("model-00001-of-00001.safetensors")


def ref(name: str, dtype: str, shape: tuple[int, ...], nbytes: int, offset: int = 0) -> TensorRef:
    return TensorRef(name, FILE, dtype, shape, offset, nbytes)


def expert(number: int, dtype: str = "F32", shape: tuple[int, ...] = (2,), layer: int = 3) -> dict:
    """One tensor of one expert with its role, as (tensors, roles) entries."""
    name = f"model.layers.{layer}.mlp.experts.{number}.w.weight"
    nbytes = math.prod(shape) * 4
    return {name: (ref(name, dtype, shape, nbytes, number * 64), Role(layer, None, number, 5))}


def split(*entries: dict) -> tuple[dict[str, TensorRef], dict[str, Role]]:
    merged = {name: entry for group in entries for name, entry in group.items()}
    return (
        {name: tensor for name, (tensor, _) in merged.items()},
        {name: role for name, (_, role) in merged.items()},
    )


@st.composite
def inventories(draw):
    """Arrays of random shapes for several layers, their roles and refs, and a choice of experts."""
    num_experts = draw(st.integers(1, 7))
    keep = draw(st.integers(1, num_experts))
    layers = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dims = st.integers(0, 3)
    arrays, roles, kept = {}, {}, {}
    each = draw(st.integers(1, 3))

    def add(name, shape, role):
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        arrays[name] = rng.integers(0, 100, shape).astype(dtype)
        roles[name] = role

    for layer in layers:
        kept[layer] = sorted(rng.choice(num_experts, keep, replace=False).tolist())
        prefix = f"layers.{layer}"
        add(f"{prefix}.whole", tuple(draw(st.lists(dims, max_size=3))), Role())
        before = draw(st.lists(dims, max_size=2))
        after = draw(st.lists(dims, max_size=2))
        extra = draw(st.integers(0, 2 * num_experts))
        shape = (*before, num_experts * each + extra, *after)
        add(f"{prefix}.fused", shape, Role(layer=layer, dim=len(before), extra=extra))
        shape = tuple(draw(st.lists(dims, max_size=2)))
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        for number in draw(st.permutations(range(num_experts))):
            name = f"{prefix}.experts.{number}.w"
            arrays[name] = rng.integers(0, 100, shape).astype(dtype)
            roles[name] = Role(layer, None, number, 3)
    return (num_experts, keep, each), kept, arrays, roles


def as_refs(arrays: dict[str, np.ndarray]) -> tuple[dict[str, TensorRef], bytes]:
    """The arrays end to end in one file, and that file's data."""
    tags = {np.dtype(dtype): tag for tag, dtype in DTYPES.items()}
    tensors, data = {}, b""
    for name, array in arrays.items():
        tensors[name] = ref(name, tags[array.dtype], array.shape, array.nbytes, len(data))
        data += array.tobytes()
    return tensors, data


@settings(max_examples=150, deadline=None)
@given(inventories(), st.integers(1, 200))
def test_plan_and_pieces_make_what_numpy_slicing_makes(inventory, max_shard_nbytes):
    (num_experts, keep, each), kept, arrays, roles = inventory
    tensors, data = as_refs(arrays)
    plan = plan_layout(tensors, roles, num_experts, keep, max_shard_nbytes)
    files = [bytearray(shard.nbytes) for shard in plan.shards]
    for file, shard in zip(files, plan.shards, strict=True):
        file[: len(shard.header)] = shard.header
    for out in plan.tensors.values():
        filled = 0
        for piece in pieces(out, tensors, roles, kept):
            assert piece.dst_offset == filled
            assert 0 < piece.nbytes <= piece.ref.nbytes - piece.src_offset
            src = piece.ref.offset + piece.src_offset
            dst = out.offset + piece.dst_offset
            files[out.shard][dst : dst + piece.nbytes] = data[src : src + piece.nbytes]
            filled += piece.nbytes
        assert filled == out.nbytes
    loaded = {}
    for file, shard in zip(files, plan.shards, strict=True):
        arrays_of_shard = load(bytes(file))
        assert set(arrays_of_shard) == {
            name for name, at in index_json(plan)["weight_map"].items() if at == shard.filename
        }
        filled = sum(array.nbytes for array in arrays_of_shard.values())
        assert (
            filled <= max_shard_nbytes or sum(a.nbytes > 0 for a in arrays_of_shard.values()) == 1
        )
        loaded.update(arrays_of_shard)
    expected = pruned_arrays(arrays, roles, kept, each)
    assert_same(loaded, expected)
    total = sum(array.nbytes for array in expected.values())
    assert index_json(plan)["metadata"]["total_size"] == plan.total_size == total
    assert plan.nbytes == sum(map(len, files))


def test_files_are_numbered_of_their_count_and_filled_in_source_order():
    tensors = {f"t{i}": ref(f"t{i}", "F32", (10,), 40, offset=400 - 40 * i) for i in range(5)}
    plan = plan_layout(tensors, {}, 4, 2, max_shard_nbytes=80)
    assert [shard.filename for shard in plan.shards] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert list(plan.tensors) == ["t4", "t3", "t2", "t1", "t0"]


def test_a_single_shard_is_numbered_too():
    plan = plan_layout({"t": ref("t", "F32", (1,), 4)}, {}, 1, 1)
    assert index_json(plan) == {
        "metadata": {"total_size": 4},
        "weight_map": {"t": "model-00001-of-00001.safetensors"},
    }


def test_a_tensor_beyond_the_limit_has_a_shard_of_its_own():
    shapes = {"a": 1, "b": 100, "c": 1, "d": 1}
    tensors = {n: ref(n, "F32", (k,), 4 * k, ord(n)) for n, k in shapes.items()}
    plan = plan_layout(tensors, {}, 1, 1, max_shard_nbytes=8)
    assert [out.shard for out in plan.tensors.values()] == [0, 1, 2, 2]


def test_slot_takes_the_place_of_the_source_expert_of_that_number():
    tensors, roles = split(*(expert(number) for number in range(4)))
    plan = plan_layout(tensors, roles, 4, 2)
    assert [(out.slot, out.name, out.origin) for out in plan.tensors.values()] == [
        (j, f"model.layers.3.mlp.experts.{j}.w.weight", "model.layers.3.mlp.experts.0.w.weight")
        for j in (0, 1)
    ]
    assert layer_tensors(plan) == {3: list(plan.tensors.values())}


def test_neighbouring_experts_are_one_run():
    tensors = {"gate": ref("gate", "F32", (2, 6, 5), 240)}
    roles = {"gate": Role(layer=0, dim=1)}
    plan = plan_layout(tensors, roles, 6, 4)
    runs = pieces(plan.tensors["gate"], tensors, roles, {0: [0, 1, 4, 5]})
    # Rows 4 and 5 of the first half touch rows 0 and 1 of the second.
    assert [(p.src_offset, p.dst_offset, p.nbytes) for p in runs] == [
        (0, 0, 40), (80, 40, 80), (200, 120, 40)
    ]  # fmt: skip


def test_dropped_tensors_are_left_out_and_need_not_be_sound():
    tensors, roles = split(expert(0), expert(1), expert(0, layer=4))
    dropped = frozenset(name for name in tensors if "layers.4" in name)
    plan = plan_layout(tensors, roles, 2, 1, dropped=dropped)
    assert list(plan.tensors) == ["model.layers.3.mlp.experts.0.w.weight"]


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([expert(0), expert(1, "F16")], r"layer 3.*w\.weight is F32 \[2\].*F16 \[2\] for expert 1"),
        ([expert(0), expert(1, shape=(3,))], r"layer 3.*F32 \[2\].*F32 \[3\] for expert 1"),
        ([expert(0)], r"exists for 1 of 2 experts; the first without it is expert 1"),
        ([expert(1)], r"the first without it is expert 0"),
        ([expert(0), expert(1), expert(2)], r"exists for expert 2, but the model has 2 experts"),
        (
            [{"g": (ref("g", "F32", (3, 4), 48), Role(layer=0, dim=0))}],
            r"'g' has shape \[3, 4\].*2 experts were expected along dimension 0",
        ),
        (
            [{"g": (ref("g", "F32", (2, 4), 32), Role(layer=0, dim=0, extra=1))}],
            r"\[2, 4\].*2 experts and 1 entries behind them were expected along dimension 0",
        ),
        ([{"g": (ref("g", "F32", (2,), 8), Role(layer=0, dim=1))}], r"along dimension 1"),
        (
            [{"g": (ref("g", "F4", (2, 3), 3), Role(layer=0, dim=0))}],
            r"'g' \(F4\) packs 3 bytes in 2 rows",
        ),
    ],
)
def test_refuses_experts_that_cannot_be_renumbered(entries, match):
    tensors, roles = split(*entries)
    with pytest.raises(UnsupportedError, match=match):
        plan_layout(tensors, roles, 2, 1)


@pytest.mark.parametrize("keep", [-1, 0, 3])
def test_refuses_a_count_that_is_none(keep):
    with pytest.raises(UsageError, match=f"cannot keep {keep} of 2 experts"):
        plan_layout({"t": ref("t", "F32", (1,), 4)}, {}, 2, keep)


def test_refuses_an_empty_checkpoint_and_an_empty_shard():
    with pytest.raises(UnsupportedError, match="no tensor to write"):
        plan_layout({}, {}, 2, 1)
    with pytest.raises(UsageError, match="cannot hold 0 bytes"):
        plan_layout({"t": ref("t", "F32", (1,), 4)}, {}, 2, 1, max_shard_nbytes=0)


@pytest.mark.parametrize(
    ("kept", "match"),
    [
        ({}, "layer 3: no kept experts"),
        ({3: [0]}, "layer 3: 1 kept experts, 2 expected"),
        ({3: [1, 0]}, "not in rising order"),
        ({3: [1, 1]}, "not in rising order"),
        ({3: [0, 4]}, r"experts 0\.\.4 are not all in 0\.\.3"),
        ({3: [-1, 2]}, r"experts -1\.\.2 are not all in 0\.\.3"),
    ],
)
def test_names_what_is_wrong_with_a_choice(kept, match):
    tensors, roles = split(*(expert(number) for number in range(4)))
    plan = plan_layout(tensors, roles, 4, 2)
    (fault,) = kept_faults(kept, [3], plan)
    assert re.search(match, fault)
    assert kept_faults({3: [0, 3]}, [3], plan) == []
