"""The experts of a layer as bytes, against the parameters of transformers' own loading."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reap_stream.checkpoint.reader import Reader
from reap_stream.model.layer import StreamedModel
from reap_stream.model.opened import open_model
from tests.builders import load_tensors, quantise
from tests.families import FAMILIES, NUM_EXPERTS
from tests.oracle import experts_modules, load_model

CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize("family_id", [family.id for family in FAMILIES])
PER_EXPERT = ["glm4_moe", "mixtral", "nemotron_h", "jamba"]


@pytest.fixture(scope="session")
def opened(tiny):
    made = {}

    def make(family_id):
        if family_id not in made:
            source = tiny(family_id)
            made[family_id] = open_model(source, dtype=torch.float32), load_model(source)
        return made[family_id]

    return make


def open_store(model, reader, slots):
    layer = model.architecture.moe_layers[-1]
    streamed = StreamedModel(model, reader, CPU, expert_slots=slots)
    return streamed.open_store(layer), layer


def by_expert(tensor, family_id):
    """[experts, ...], whatever lies behind the experts or in one with their rows."""
    if family_id == "dbrx":
        return tensor.unflatten(0, (NUM_EXPERTS, -1))
    return tensor[:NUM_EXPERTS] if family_id == "longcat_flash" else tensor


def assert_expert(found, module, expert, family_id):
    expected = {
        leaf: by_expert(tensor, family_id)
        for leaf, tensor in module.named_parameters(recurse=False)
    }
    assert set(found) <= set(expected)
    assert set(found) & {"down_proj", "w2"}
    for leaf, tensor in found.items():
        assert torch.equal(tensor, expected[leaf][expert]), (leaf, expert)


@EVERY
@pytest.mark.parametrize("slots", [3, NUM_EXPERTS])
def test_parameters_are_those_transformers_loads(family_id, slots, opened):
    model, whole = opened(family_id)
    with Reader() as reader:
        store, layer = open_store(model, reader, slots)
        for expert in range(NUM_EXPERTS):
            following = expert + 1 if expert + 1 < NUM_EXPERTS else None
            found = store.parameters(expert, torch.float32, CPU, following)
            assert_expert(found, experts_modules(whole)[layer], expert, family_id)
        store.close()


@EVERY
def test_stacked_parameters_are_the_modules(family_id, opened):
    model, whole = opened(family_id)
    with Reader() as reader:
        store, layer = open_store(model, reader, 3)
        stacked = store.stacked(torch.float32, CPU)
        for leaf, tensor in experts_modules(whole)[layer].named_parameters(recurse=False):
            assert torch.equal(stacked[leaf], by_expert(tensor, family_id))
        store.close()


@pytest.mark.parametrize("family_id", PER_EXPERT)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=24),
    hints=st.lists(st.none() | st.integers(0, NUM_EXPERTS - 1), min_size=24, max_size=24),
    slots=st.integers(1, NUM_EXPERTS),
)
# The slot of an expert that is in use must not be refilled with the one that follows.
@example(order=[5, 7, 5], hints=[7, 5, 6] * 8, slots=3)
def test_any_order_and_any_hint_give_the_right_expert(family_id, order, hints, slots, opened):
    model, whole = opened(family_id)
    with Reader() as reader:
        store, layer = open_store(model, reader, slots)
        for expert, hint in zip(order, hints, strict=False):
            found = store.parameters(expert, torch.float32, CPU, hint)
            assert_expert(found, experts_modules(whole)[layer], expert, family_id)
        store.close()


@EVERY
def test_resident_bytes_are_the_files(family_id, opened, tiny):
    model, _ = opened(family_id)
    tensors = load_tensors(tiny(family_id))
    with Reader() as reader:
        store, layer = open_store(model, reader, 5)
        found = 0
        for name, role in model.tensor_map.roles.items():
            raw = store.resident(model.checkpoint.tensors[name])
            if raw is None:
                continue
            found += 1
            assert role.layer == layer
            assert raw.tobytes() == tensors[name].numpy().tobytes()
            assert role.expert is None or role.expert < 3
        assert found
        store.close()
        assert all(store.resident(ref) is None for ref in model.checkpoint.tensors.values())


@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
@pytest.mark.parametrize("slots", [3, NUM_EXPERTS])
def test_fp8_experts_are_decoded_to_what_they_mean(scheme, slots, tiny, tmp_path):
    stored, meant = quantise(tiny("glm4_moe"), tmp_path, scheme, torch.float32, 24)
    model, whole = open_model(stored, dtype=torch.float32), load_model(meant)
    with Reader() as reader:
        store, layer = open_store(model, reader, slots)
        for expert in (0, 7, 3, 4):
            found = store.parameters(expert, torch.float32, CPU)
            assert_expert(found, experts_modules(whole)[layer], expert, "glm4_moe")
        store.close()
